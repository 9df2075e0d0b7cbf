"""Which of upstream's trainers MLX stands in for, where scripts import them from, and how they are configured."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

from .imports import Imports, is_initializing


class StandIn(NamedTuple):
    """One trainer of upstream's.

    Attributes:
        name: Upstream's name of the class.
        trainer: The class that trains it here, as ``module:Class`` below ``hf_mlx``.
        homes: Modules that a script may import it from; the first one defines it.
        configs: Its configuration classes, as ``module:Class``; their constructors take older names too.
        heirs: Upstream's modules whose classes derive from upstream's own trainer, and must go on to.
        older_keywords: Whether the class that trains it here takes keywords of older releases itself.
    """

    name: str
    trainer: str
    homes: tuple[str, ...]
    configs: tuple[str, ...]
    heirs: tuple[str, ...] = ()
    older_keywords: bool = True

    def load(self) -> type:
        """The class that trains it here."""
        from ..backends import prepare_backend

        prepare_backend()
        module, _, name = self.trainer.partition(":")
        return getattr(import_module(f"hf_mlx.{module}"), name)


# A trainer is one row.
STAND_INS = (
    StandIn(
        "SFTTrainer",
        "trainers.sft:MLXSFTTrainer",
        ("trl.trainer.sft_trainer", "trl.trainer", "trl"),
        ("transformers.training_args:TrainingArguments", "trl.trainer.sft_config:SFTConfig"),
    ),
    StandIn(
        "DPOTrainer",
        "trainers.dpo:MLXDPOTrainer",
        ("trl.trainer.dpo_trainer", "trl.trainer", "trl"),
        ("transformers.training_args:TrainingArguments", "trl.trainer.dpo_config:DPOConfig"),
    ),
    StandIn(
        "RewardTrainer",
        "trainers.reward:MLXRewardTrainer",
        ("trl.trainer.reward_trainer", "trl.trainer", "trl"),
        ("transformers.training_args:TrainingArguments", "trl.trainer.reward_config:RewardConfig"),
    ),
    StandIn(
        "Trainer",
        "trainers.lm:MLXTrainer",
        ("transformers.trainer", "transformers"),
        ("transformers.training_args:TrainingArguments",),
        # All of trl's trainers derive from the first.
        ("trl.trainer.base_trainer", "transformers.trainer_seq2seq"),
        older_keywords=False,
    ),
    # What it adds to Trainer is generation in evaluation, which is left to torch.
    StandIn(
        "Seq2SeqTrainer",
        "trainers.lm:MLXTrainer",
        ("transformers.trainer_seq2seq", "transformers"),
        ("transformers.training_args_seq2seq:Seq2SeqTrainingArguments",),
        older_keywords=False,
    ),
)


def replace_trainer(row: StandIn, derive: Callable[[type, type], type], imports: Imports) -> None:
    """Put a trainer in upstream's place once its home is imported.

    Args:
        row: Which.
        derive: Makes the class to put there from this library's and upstream's.
        imports: Where to wait for its modules.
    """
    ours: list[type] = []

    def is_done() -> bool:
        return bool(ours) and getattr(sys.modules[row.homes[0]], row.name) is ours[0]

    def replace(module: object) -> None:
        if row.homes[0] not in sys.modules or is_done():
            return
        for heir in row.heirs:
            if is_initializing(heir) and sys.modules[heir] is not module:
                # It is being imported around this import: its own end comes back here.
                return
            if find_spec(heir.partition(".")[0]) is not None:
                import_module(heir)
        # The end of an heir's import may have come here already.
        if is_done():
            return
        upstream = getattr(sys.modules[row.homes[0]], row.name)
        ours[:] = ours or [derive(row.load(), upstream)]
        for home in row.homes:
            if home in sys.modules:
                setattr(sys.modules[home], row.name, ours[0])

    for name in (*row.heirs, row.homes[0]):
        imports.after(name, replace)
