"""Two traces side by side: the first step that differs, by how much, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .causes import Cause, Finding, Pair, find_cause, gap
from .trace import Trace, read_trace

# In the order of cause and effect: what comes first explains what comes after.
_FIELDS = ("batch", "targets", "lr", "loss", "grad_norm")


@dataclass(frozen=True)
class Comparison:
    """Where two runs part. Prints as a few lines; true if they are the same within the tolerance.

    Attributes:
        steps: Steps that both traces have.
        step, field, a, b: The first difference and both values there; None if there is none.
        cause, why: What likely lies behind it, and what points to it.
        max_gap: Largest relative difference of the loss over all steps.
        drift: Mean of loss a − loss b: rounding averages out, a one-sided error does not.
    """

    steps: int
    step: int | None
    field: str | None
    a: Any
    b: Any
    cause: Cause | None
    why: str
    max_gap: float
    drift: float

    def __bool__(self) -> bool:
        return self.step is None and self.cause is None

    def __str__(self) -> str:
        summary = f"loss: largest relative difference {self.max_gap:.2e}, mean signed difference {self.drift:+.2e}"
        if self:
            return f"{self.steps} steps, the same\n{summary}"
        where = f"{self.steps} steps in both"
        if self.step is not None:
            where = f"first difference at step {self.step}: {self.field} {self.a} against {self.b}"
            if isinstance(self.a, float) and isinstance(self.b, float):
                where += f" (relative {gap(self.a, self.b):.2e})"
        return f"{where}\nlikely cause: {self.cause} ({self.why})\n{summary}"


def compare_traces(a: str | Path | Trace, b: str | Path | Trace, *, tolerance: float = 1e-4) -> Comparison:
    """Compare two runs step by step.

    Args:
        a, b: Traces, or the files that :class:`~hf_mlx.traces.callback.TraceCallback` wrote.
        tolerance: Relative difference of loss, grad_norm and lr that counts as one. 1e-4 is above what float32
            rounding does to a run of hundreds of steps and below what any setting does.

    Raises:
        DataError: A file is missing or is not a trace.
    """
    left, right = (trace if isinstance(trace, Trace) else read_trace(trace) for trace in (a, b))
    others = {step.step: step for step in right.steps}
    pairs = [(step, others[step.step]) for step in left.steps if step.step in others]
    losses = [(x.loss, y.loss) for x, y in pairs if x.loss is not None and y.loss is not None]
    spread = max((gap(x, y) for x, y in losses), default=0.0)
    drift = sum(x - y for x, y in losses) / max(len(losses), 1)
    found = _first_difference(pairs, tolerance)
    if found is None:
        ending = _judge_length(left, right, pairs)
        cause, why = (ending.cause, ending.why) if ending else (None, "")
        return Comparison(len(pairs), None, None, None, None, cause, why, spread, drift)
    index, field = found
    x, y = pairs[index]
    finding = find_cause(pairs, index, field, (left.header, right.header), tolerance)
    first = (x.step, field, getattr(x, field), getattr(y, field))
    return Comparison(len(pairs), *first, finding.cause, finding.why, spread, drift)


def _first_difference(pairs: Sequence[Pair], tolerance: float) -> tuple[int, str] | None:
    for index, (x, y) in enumerate(pairs):
        for field in _FIELDS:
            a, b = getattr(x, field), getattr(y, field)
            if a is None or b is None:
                continue
            if (a != b) if field in ("batch", "targets") else gap(a, b) > tolerance:
                return index, field
    return None


def _judge_length(left: Trace, right: Trace, pairs: Sequence[Pair]) -> Finding | None:
    counts = len(left.steps), len(right.steps)
    if counts[0] == counts[1] == len(pairs):
        return None
    return Finding(
        "length", f"the same over {len(pairs)} common steps; one run has {counts[0]} steps, the other {counts[1]}"
    )
