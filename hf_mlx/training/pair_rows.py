"""Sums over the answers of pairs: what is known of single tokens, by answer and by pair."""

from __future__ import annotations

import mlx.core as mx

from ..models.sums import blocked_sum
from .linear_logps import TokenLogps
from .loss import IGNORED
from .optimizers.contract import Arrays


def by_pair(values: mx.array) -> mx.array:
    """What is known of each answer, (2P,), (2P, 1) or (P, 2), as (P, 2): chosen and rejected."""
    return values.reshape(-1, 2)


def rows_together(arrays: Arrays) -> int:
    """Rows of a pair: one for each answer, or one for both."""
    return 1 if "splits" in arrays else 2


def sum_answers(logp: mx.array, arrays: Arrays, ld_alpha: float | None) -> mx.array:
    """Log-probabilities of scored tokens (N,) summed over each answer, (2P,).

    Args:
        logp: Of each scored token.
        arrays: Of the micro-batch.
        ld_alpha: Weight of tokens past the shorter answer of a pair (LD-DPO, https://huggingface.co/papers/2409.06411).
    """
    if ld_alpha is not None:
        logp = mx.where(scored(arrays["shared"][..., None], arrays)[:, 0], logp, ld_alpha * logp)
    return sum_by_answer(logp, arrays)


def sum_by_answer(values: mx.array, arrays: Arrays) -> mx.array:
    """Values of scored tokens (N,), summed over each answer, (2P,): chosen and rejected of a pair are neighbours."""
    # One sum an answer rather than a scatter: deterministic on every backend.
    belongs = answers_of_tokens(arrays) == mx.arange(arrays["answers"].size)[:, None]
    return blocked_sum(mx.where(belongs, values, 0.0))


def answers_of_tokens(arrays: Arrays) -> mx.array:
    """The answer of each scored token, (N,) int32: even numbers are chosen ones."""
    width = arrays["input_ids"].shape[1]
    positions = arrays["positions"] if "positions" in arrays else mx.arange(arrays["targets"].shape[0])
    rows = positions // width
    return 2 * rows + (positions % width >= arrays["splits"][rows, 0]) if "splits" in arrays else rows


def wpo_weights(tokens: TokenLogps, arrays: Arrays) -> mx.array:
    """Eq. 2 of https://huggingface.co/papers/2406.11827, aligned, (P,); carries no gradient."""
    aligned = mx.stop_gradient(tokens.logp - tokens.log_square_sum)
    counted = (arrays["targets"] != IGNORED).astype(mx.float32)
    counts = mx.maximum(sum_by_answer(counted, arrays), 1.0)
    weights = by_pair(mx.exp(sum_by_answer(aligned, arrays) / counts))
    return mx.stop_gradient(weights[:, 0] * weights[:, 1])


def scored(x: mx.array, arrays: Arrays) -> mx.array:
    """Of what every position has (R, W, …), that of the scored tokens, (N, …)."""
    flat = x.reshape(-1, x.shape[-1])
    return flat[arrays["positions"]] if "positions" in arrays else flat
