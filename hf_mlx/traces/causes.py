"""Why two runs part: each cause leaves its own pattern in the first steps that differ."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .trace import TraceStep

Cause = Literal[
    "data order", "rows", "labels", "schedule", "start", "normalisation", "dtype", "clip", "optimizer", "length"
]
Pair = tuple[TraceStep, TraceStep]
Headers = tuple[Mapping[str, Any], Mapping[str, Any]]

# bfloat16 arithmetic moves a loss by about 1e-3 and a gradient norm by about 1e-2; another start, by far more.
ROUNDING_LOSS = 1e-2
ROUNDING_NORM = 5e-2
# Loss and gradient norm that differ by one common factor: how equal the two factors have to be.
SAME_FACTOR = 1e-3


@dataclass(frozen=True)
class Finding:
    """The likely cause, and the sentence that says what points to it."""

    cause: Cause
    why: str


def gap(a: float | None, b: float | None) -> float:
    """Relative difference, 0 where a side is unknown and infinite where exactly one is not a finite number."""
    if a is None or b is None or a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    if not (math.isfinite(a) and math.isfinite(b)):
        return math.inf
    return abs(a - b) / max(abs(a), abs(b))


def find_cause(pairs: Sequence[Pair], index: int, field: str, headers: Headers, tolerance: float) -> Finding:
    """Judge the first difference.

    Args:
        pairs: The steps of both traces, side by side.
        index: Position of the first pair that differs.
        field: The first field that differs there; batch, targets and lr come before loss and grad_norm.
        headers: What both runs were.
        tolerance: Relative difference that counts as one.
    """
    if field == "batch":
        return _judge_batches(pairs)
    if field == "targets":
        return Finding("labels", "the same tokens were trained on, but other positions count: masks or packing differ")
    if field == "lr":
        return _judge_lr(pairs, tolerance)
    if index == 0:
        return _judge_first_step(pairs[0], headers, tolerance)
    return _judge_later_step(pairs, index, headers, tolerance)


def _judge_batches(pairs: Sequence[Pair]) -> Finding:
    ours, theirs = (Counter(pair[side].batch for pair in pairs) for side in (0, 1))
    if ours == theirs:
        return Finding("data order", "both runs saw the same batches in another order: seed, data_seed or sampler")
    if sum(pair[0].tokens or 0 for pair in pairs) == sum(pair[1].tokens or 0 for pair in pairs):
        return Finding("data order", "both runs saw as many tokens in other batches: seed, data_seed or sampler")
    if (ours & theirs).total() * 2 >= len(pairs):
        return Finding("data order", "most batches are the same ones, elsewhere: seed, data_seed or sampler")
    return Finding("rows", "hardly a batch is in both runs: other rows, tokenizer, template, max_length, or order")


def _judge_lr(pairs: Sequence[Pair], tolerance: float) -> Finding:
    both = [(a.lr, b.lr) for a, b in pairs if a.lr and b.lr]
    if both and all(gap(a / b, both[0][0] / both[0][1]) <= tolerance for a, b in both):
        return Finding(
            "schedule", f"the rates differ by the constant factor {both[0][0] / both[0][1]:.6g}: learning_rate"
        )
    return Finding("schedule", "the rates have another shape: lr_scheduler_type, its options, warmup or total steps")


def _judge_first_step(pair: Pair, headers: Headers, tolerance: float) -> Finding:
    a, b = pair
    loss, norm = gap(a.loss, b.loss), gap(a.grad_norm, b.grad_norm)
    if gap(headers[0].get("start_norm"), headers[1].get("start_norm")) > tolerance:
        return Finding("start", "the trainable weights have another norm before the first step: seed or initialisation")
    factor = _common_factor(a, b, loss, norm)
    if factor is not None:
        return Finding("normalisation", f"loss and gradient norm differ by one factor, {factor:.6g}: the denominator")
    if loss <= ROUNDING_LOSS and norm <= ROUNDING_NORM and (loss > tolerance or _dtypes_differ(headers)):
        return Finding("dtype", "the first step differs by as much as rounding does" + _dtype_note(headers))
    if loss <= tolerance:
        return Finding(
            "normalisation" if norm and _whole(a.grad_norm, b.grad_norm) else "start",
            "the first loss is equal and its gradient is not: gradients divided otherwise than the loss, or a start "
            "that the first loss does not show (a LoRA B of zero hides its A)",
        )
    return Finding("start", "the very first loss differs on the same tokens: weights, adapter or the forward pass")


def _common_factor(a: TraceStep, b: TraceStep, loss: float, norm: float) -> float | None:
    if min(loss, norm) <= ROUNDING_LOSS or not (a.loss and b.loss and a.grad_norm and b.grad_norm):
        return None
    factor = a.loss / b.loss
    return factor if gap(factor, a.grad_norm / b.grad_norm) <= SAME_FACTOR else None


def _whole(a: float | None, b: float | None) -> bool:
    """True if one number is a whole multiple of the other, as after dividing by a count."""
    if not a or not b:
        return False
    factor = max(a / b, b / a)
    return round(factor) > 1 and gap(factor, round(factor)) <= SAME_FACTOR


def _judge_later_step(pairs: Sequence[Pair], index: int, headers: Headers, tolerance: float) -> Finding:
    (a, b), (last_a, last_b) = pairs[index], pairs[index - 1]
    before = max(gap(last_a.loss, last_b.loss), gap(last_a.grad_norm, last_b.grad_norm))
    now = max(gap(a.loss, b.loss), gap(a.grad_norm, b.grad_norm))
    # Rounding has been growing for a while when it crosses the tolerance; another update comes at once.
    if before > tolerance / 20 and now < 20 * before:
        return Finding("dtype", "the difference grew from rounding, step by step" + _dtype_note(headers))
    if _is_clip(pairs, index, headers):
        return Finding("clip", "equal until an update whose gradient norm exceeds the clip: max_grad_norm or its kind")
    return Finding(
        "optimizer",
        "equal up to here with equal gradients, so the update differs: betas, epsilon, bias correction, weight decay",
    )


def _is_clip(pairs: Sequence[Pair], index: int, headers: Headers) -> bool:
    limits = [header.get("max_grad_norm") or math.inf for header in headers]
    applied = [pair[0] for pair in pairs[:index] if pair[0].lr != 0 and pair[0].grad_norm is not None]
    if not applied or applied[-1].grad_norm <= min(limits):  # type: ignore[operator]
        return False
    # Either the clips are known to differ, or smaller gradients were applied before without harm.
    return limits[0] != limits[1] or any(step.grad_norm <= min(limits) for step in applied)  # type: ignore[operator]


def _dtypes_differ(headers: Headers) -> bool:
    return any(headers[0].get(key) != headers[1].get(key) for key in ("dtypes", "bf16"))


def _dtype_note(headers: Headers) -> str:
    if not _dtypes_differ(headers):
        return "; dtypes are the same on paper: look at autocast, attention and reductions"
    names = [f"{'+'.join(header.get('dtypes') or ['?'])}, bf16={header.get('bf16')}" for header in headers]
    return f": {names[0]} against {names[1]}"
