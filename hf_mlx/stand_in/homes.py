"""Which of upstream's trainers MLX stands in for, where scripts import them from, and how they are configured."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module


@dataclass(frozen=True)
class StandIn:
    """One trainer of upstream's.

    Attributes:
        name: Upstream's name of the class.
        trainer: The class that trains it here, as ``module:Class`` below this package.
        homes: Modules that a script may import it from.
        configs: Its configuration classes, as ``module:Class``; their constructors take older names too.
    """

    name: str
    trainer: str
    homes: tuple[str, ...]
    configs: tuple[str, ...]

    def load(self) -> type:
        """The class that trains it here."""
        module, _, name = self.trainer.partition(":")
        return getattr(import_module(f"hf_mlx.{module}"), name)


# A trainer is one row.
STAND_INS = (
    StandIn(
        "SFTTrainer",
        "trainers.sft:MLXSFTTrainer",
        ("trl", "trl.trainer", "trl.trainer.sft_trainer"),
        ("transformers:TrainingArguments", "trl:SFTConfig"),
    ),
    StandIn(
        "DPOTrainer",
        "trainers.dpo:MLXDPOTrainer",
        ("trl", "trl.trainer", "trl.trainer.dpo_trainer"),
        ("transformers:TrainingArguments", "trl:DPOConfig"),
    ),
)
