"""What each micro-batch of a window weighs in the gradient and in the log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx

from .inputs import Inputs
from .objective import TOKEN_METRICS

# {"loss": …, "aux_loss": …, "metrics": {name: …}}
Weights = dict[str, Any]


class Weighting(Protocol):
    """The micro-batches of a window -> for each, the factors of its sums, as float32 scalars.

    ``loss`` and ``aux_loss`` weigh in what is minimised, ``metrics`` by name in the log; a metric left out weighs 1.
    """

    def __call__(self, window: Sequence[Inputs]) -> list[Weights]: ...


class ByMicroBatch:
    """Each micro-batch of a window weighs the same, however many rows it has (trl 1.16 ``DPOTrainer``).

    What the objective returns is a mean over the micro-batch already.
    """

    def __call__(self, window: Sequence[Inputs]) -> list[Weights]:
        """The factors of each micro-batch of ``window``."""
        share = mx.array(1 / len(window))
        return [{"loss": share, "metrics": {}, "aux_loss": share} for _ in window]


@dataclass(frozen=True)
class ByTokens:
    """Sums over tokens become the means that transformers and TRL take.

    Attributes:
        accepts_loss_kwargs: True normalises by the tokens of the whole window; False (some HF classes) takes
            each micro-batch's own mean, divided by the number of micro-batches.
        counts_every_label: Those tokens are all that are labelled, not the targets alone.
    """

    accepts_loss_kwargs: bool = True
    counts_every_label: bool = False

    def __call__(self, window: Sequence[Inputs]) -> list[Weights]:
        """The factors of each micro-batch of ``window``."""
        items = max(self.count(window), 1)
        return [
            {
                "loss": mx.array(1 / items if self.accepts_loss_kwargs else 1 / (max(micro.valid, 1) * len(window))),
                "metrics": dict.fromkeys(TOKEN_METRICS, mx.array(1 / max(micro.valid, 1))),
                "aux_loss": mx.array(1 / len(window)),
            }
            for micro in window
        ]

    def count(self, window: Sequence[Inputs]) -> int:
        """Tokens of the window that its loss is divided by; 0 where none is trained."""
        return sum(micro.labelled if self.counts_every_label else micro.valid for micro in window)
