"""What a step measured, and what it changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx

from .optimizers.contract import Arrays


@dataclass(frozen=True)
class StepMetrics:
    """What one optimizer step measured. Lazy float32 scalars until read.

    Attributes:
        loss: Sum of the window's micro-losses, each already divided by its denominator.
        grad_norm: Global L2 norm before clipping; None where no update was made.
        micro_batches: How many micro-batches the sums run over.
        metrics: Sums over the window of what the objective measured of each micro-batch, by name.
        own_loss: Of several processes the loss as this one alone sees it; None for one.
    """

    loss: mx.array
    grad_norm: mx.array | None
    micro_batches: mx.array
    metrics: Arrays
    own_loss: mx.array | None = None

    @classmethod
    def split(cls, sums: Mapping[str, mx.array]) -> StepMetrics:
        """From one dict of everything that adds up; ``grad_norm`` may be missing."""
        apart = ("loss", "grad_norm", "micro_batches", "own_loss")
        metrics = {name: value for name, value in sums.items() if name not in apart}
        return cls(sums["loss"], sums.get("grad_norm"), sums["micro_batches"], metrics, sums.get("own_loss"))


@dataclass(eq=False)
class Held:
    """All that an optimizer step changes, as it was at one moment; arrays as they are kept.

    Attributes:
        taken: An update let the arrays go, so nothing can be taken back.
    """

    params: Arrays
    state: dict[str, Arrays]
    carry: tuple[Arrays, Arrays] | None
    draws: int
    taken: bool = False

    def give_up(self) -> None:
        """Let go of the arrays."""
        self.params, self.state, self.carry, self.taken = {}, {}, None, True
