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


def _of_plan(field: str, doc: str) -> Any:
    """A property that reads a field of the loss settings."""
    return property(lambda self: getattr(self._loss, field), doc=doc)


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

    beta = _of_plan("beta", "How far the policy may move from its reference.")

    @property
    def loss_types(self) -> list[str]:
        """The losses that are added up."""
        return [name for name, _ in self._loss.losses]

    @property
    def loss_weights(self) -> list[float]:
        """What each of them weighs."""
        return [weight for _, weight in self._loss.losses]

    label_smoothing = _of_plan("label_smoothing", "Of the losses that take the chance of a wrong preference.")
    ld_alpha = _of_plan("ld_alpha", "What tokens beyond the shorter answer weigh (LD-DPO).")
    f_divergence_type = _of_plan("f_divergence_type", "Which divergence keeps the policy near its reference.")
    f_alpha_divergence_coef = _of_plan("f_alpha_divergence_coef", "Of the alpha divergence.")
    use_weighting = _of_plan("use_weighting", "Whether pairs are weighed as WPO does.")
    precompute_ref_logps = _of_plan("precompute", "Whether the reference was computed before training.")

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
