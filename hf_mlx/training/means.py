"""Running means and counters of a run that HF's TrainerState has no place for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Means:
    """Running metrics of training, averaged and cleared at each log (trl 1.16 ``SFTTrainer._metrics``)."""

    entropy: float = 0.0
    accuracy: float = 0.0
    micro_batches: int = 0
    aux_loss: float | None = None

    def take(self) -> dict[str, float]:
        """The means since the last call; empty when nothing ran."""
        if not self.micro_batches:
            return {}
        means = {
            "entropy": self.entropy / self.micro_batches,
            "mean_token_accuracy": self.accuracy / self.micro_batches,
        }
        if self.aux_loss is not None:
            means["aux_loss"] = self.aux_loss / self.micro_batches
        self.entropy = self.accuracy = 0.0
        self.micro_batches, self.aux_loss = 0, None
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
        return vars(self) | {"means": dict(vars(self.means))}
