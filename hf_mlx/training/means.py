"""Running means and counters of a run that HF's TrainerState has no place for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Means:
    """Running metrics of training, averaged and cleared at each log (trl 1.16 ``SFTTrainer._metrics``)."""

    sums: dict[str, float] = field(default_factory=dict)
    micro_batches: int = 0

    def add(self, metrics: Mapping[str, float], micro_batches: int) -> None:
        """Take sums over ``micro_batches``, by name."""
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.micro_batches += micro_batches

    def take(self) -> dict[str, float]:
        """The means since the last call; empty when nothing ran."""
        if not self.micro_batches:
            return {}
        means = {name: value / self.micro_batches for name, value in self.sums.items()}
        self.sums, self.micro_batches = {}, 0
        return means


@dataclass
class Progress:
    """Counters of a run that HF's TrainerState has no place for.

    Attributes:
        mode: ``"train"`` or ``"eval"``: whose metrics the next log entry carries (TRL reads ``model.training``).
        num_tokens: Tokens trained on so far, resumed runs included.
        padding, positions: Padded and all positions that were computed.
        means: Running metrics of training.
    """

    mode: str = "train"
    num_tokens: int = 0
    padding: int = 0
    positions: int = 0
    means: Means = field(default_factory=Means)

    def to_dict(self) -> dict[str, Any]:
        """A copy as plain values."""
        return vars(self) | {"means": {**vars(self.means), "sums": dict(self.means.sums)}}
