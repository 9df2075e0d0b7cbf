"""One run as its report shows it: series by step, and what was said about it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# What a log entry holds beside measurements of its step.
_COUNTERS = ("epoch", "step", "num_tokens", "num_input_tokens_seen", "total_flos", "train_loss")
_TIMES = ("_runtime", "_per_second", "_model_preparation_time", "num_tokens")
_MEMORY = "_mem_"
LOSSES = ("loss", "eval_loss")
#: Panels in this order; what else was logged comes after them.
FIRST = ("learning_rate", "grad_norm", "tokens/s", "memory (GiB)")


@dataclass(frozen=True)
class Mark:
    """What the host knew when an entry was logged.

    Attributes:
        seconds: Since ``train()`` began.
        tokens: Tokens trained on so far.
        memory: The most bytes that MLX held at once so far.
    """

    seconds: float
    tokens: float
    memory: int


@dataclass(frozen=True)
class Series:
    """Values of one name by step; a value may be NaN or infinite, as it was logged."""

    name: str
    points: tuple[tuple[float, float], ...]

    @property
    def finite(self) -> tuple[tuple[float, float], ...]:
        """The points that can be drawn."""
        return tuple(point for point in self.points if math.isfinite(point[1]))


@dataclass(frozen=True)
class Sample:
    """A training row: stretches of text, each with whether it is trained on."""

    title: str
    stretches: tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class Run:
    """Everything a report shows.

    Attributes:
        title: What was trained.
        facts: Name to value, in the order shown.
        series: Losses first.
        rulings: Field, value, verdict and reason of the settings that were set or are done another way.
        notes: Lines that the run said once.
        samples: A few training rows.
        failure: Why the run stopped early, in a line; empty where it did not.
    """

    title: str
    facts: Mapping[str, str]
    series: Sequence[Series]
    rulings: Sequence[tuple[str, str, str, str]] = ()
    notes: Sequence[str] = ()
    samples: Sequence[Sample] = ()
    failure: str = ""
    losses: tuple[Series, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "losses", tuple(one for one in self.series if _is_loss(one.name)))

    @property
    def others(self) -> tuple[Series, ...]:
        """The series beside the losses."""
        return tuple(one for one in self.series if one not in self.losses)

    def describe_loss(self) -> str:
        """The training loss from its first to its last entry, in a line."""
        points = next((one.finite for one in self.losses if one.name == "loss"), ())
        if not points:
            return "no loss was logged"
        (first, begin), (last, end) = points[0], points[-1]
        return f"loss {begin:.4g} at step {first:g} → {end:.4g} at step {last:g}"


def read_series(history: Iterable[Mapping[str, Any]], marks: Mapping[int, Mark] | None = None) -> list[Series]:
    """The series of a ``log_history``, the losses first.

    Args:
        history: Entries of ``TrainerState.log_history``, of any trainer of transformers.
        marks: By an entry's place, what was measured when it was logged; at -1, when training began.

    Returns:
        Every number that was logged of a step, and ``tokens/s`` and ``memory (GiB)`` where there are marks.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    marks = marks or {}
    last = marks.get(-1, Mark(0.0, 0.0, 0))
    for place, entry in enumerate(history):
        step = float(entry.get("step", 0))
        # The metrics of the whole run are no point of its curve.
        if "train_runtime" not in entry:
            for name, value in entry.items():
                if _is_measured(name, value):
                    found.setdefault(name, []).append((step, float(value)))
        mark = marks.get(place)
        if mark is None or "train_runtime" in entry:
            continue
        seconds, tokens = mark.seconds - last.seconds, mark.tokens - last.tokens
        if "loss" in entry and tokens > 0 and seconds > 0:
            found.setdefault("tokens/s", []).append((step, tokens / seconds))
            found.setdefault("memory (GiB)", []).append((step, mark.memory / 2**30))
        # An evaluation's own time trains no token; an entry of a callback's own ends no stretch.
        if "loss" in entry or any(name.endswith("_runtime") for name in entry):
            last = mark
    names = sorted(found, key=lambda name: (not _is_loss(name), *_rank(name)))
    return [Series(name, tuple(found[name])) for name in names]


def _is_measured(name: str, value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return name not in _COUNTERS and _MEMORY not in name and not name.endswith(_TIMES)


def _is_loss(name: str) -> bool:
    # eval_dataset may be a dict: eval_{name}_loss.
    return name == "loss" or (name.startswith("eval_") and name.endswith("_loss"))


def _rank(name: str) -> tuple[int, int]:
    order = (*LOSSES, *FIRST)
    return (order.index(name), 0) if name in order else (len(order), name.startswith("eval_"))
