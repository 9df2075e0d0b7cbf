"""Public names of trl's ``DPOTrainer`` that say what is minimised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import MissingDependency
from ..settings.plan import PairLossPlan
from .base import TrainerBase

_FIELDS = """
    beta label_smoothing ld_alpha f_divergence_type f_alpha_divergence_coef use_weighting
"""


class PairNames(TrainerBase):
    """The settings of the loss under trl's names; they are the plan's, so they are set in its configuration."""

    loss_is_scaled_for_ga = False
    #: What may not be set on the trainer, with what to write instead.
    remedies: Mapping[str, str] = {
        **{name: f"DPOConfig({name}=…), in a trainer of its own" for name in _FIELDS.split()},
        "loss_types": "DPOConfig(loss_type=[…]), in a trainer of its own",
        "loss_weights": "DPOConfig(loss_weights=[…]), in a trainer of its own",
        "precompute_ref_logps": "DPOConfig(precompute_ref_log_probs=True), in a trainer of its own",
        "ref_model": "MLXDPOTrainer(ref_model=…)",
        "loss_is_scaled_for_ga": "leave it as it is: the loss is compiled",
    }

    @property
    def beta(self) -> float:
        """How far the policy may move from its reference."""
        return self._loss.beta

    @property
    def loss_types(self) -> list[str]:
        """The losses that are added up."""
        return [name for name, _ in self._loss.losses]

    @property
    def loss_weights(self) -> list[float]:
        """What each of them weighs."""
        return [weight for _, weight in self._loss.losses]

    @property
    def label_smoothing(self) -> float:
        """Of the losses that take the chance of a wrong preference."""
        return self._loss.label_smoothing

    @property
    def ld_alpha(self) -> float | None:
        """What tokens beyond the shorter answer weigh (LD-DPO)."""
        return self._loss.ld_alpha

    @property
    def f_divergence_type(self) -> str:
        """Which divergence keeps the policy near its reference."""
        return self._loss.f_divergence_type

    @property
    def f_alpha_divergence_coef(self) -> float:
        """Of the alpha divergence."""
        return self._loss.f_alpha_divergence_coef

    @property
    def use_weighting(self) -> bool:
        """Whether pairs are weighed as WPO does."""
        return self._loss.use_weighting

    @property
    def precompute_ref_logps(self) -> bool:
        """Whether the reference was computed before training."""
        return self._loss.precompute

    @property
    def data_collator(self) -> Any:
        """The script's own collator, or the one that trl's trainer would have made for these settings."""
        if self.data.collator is not None:
            return self.data.collator
        try:
            from trl.trainer.dpo_trainer import DataCollatorForPreference
        except ImportError as error:
            raise MissingDependency("trainer.data_collator", "trl, whose collator it is", "pip install trl") from error
        plan = self.plan.data
        return DataCollatorForPreference(
            pad_token_id=self.processing_class.pad_token_id,
            max_length=plan.max_length,
            truncation_mode=plan.truncation_mode,
            pad_to_multiple_of=plan.pad_to_multiple_of,
        )

    @property
    def _loss(self) -> PairLossPlan:
        assert isinstance(self.plan.loss, PairLossPlan)
        return self.plan.loss
