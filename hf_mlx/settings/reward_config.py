"""What each field that ``trl.RewardConfig`` (1.16) adds does on MLX, the defaults it overrides, and its plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .dpo_config import DISABLE_DROPOUT, PAD_TO_MULTIPLE_OF, SAMPLING, resolve_multiple
from .plan import DataPlan, ScoreLossPlan
from .ranges import check_flag, check_number, check_optional_count
from .sft_config import CHAT_TEMPLATE_PATH, MODEL_INIT_KWARGS, TRUST_REMOTE_CODE
from .verdicts import Rule, honour, ignore, refuse

# Fields of TrainingArguments that RewardConfig gives another default (trl 1.16, _BaseConfig and RewardConfig).
REWARD_DEFAULTS: Mapping[str, Any] = {
    "learning_rate": 1e-4,
    "logging_steps": 10,
    "gradient_checkpointing": True,
    "bf16": None,
}
_QUANTIZED = ("quantization_config", "load_in_4bit", "load_in_8bit")


def _load_rule(rule: Rule) -> Rule:
    if rule.field not in _QUANTIZED:
        return rule
    return refuse(
        rule.field, rule.default, "quantises the base of a reward model", write='model_init_kwargs without "{key}"'
    )


REWARD_CONFIG: tuple[Rule, ...] = (
    replace(MODEL_INIT_KWARGS, keys=tuple(map(_load_rule, MODEL_INIT_KWARGS.keys))),
    TRUST_REMOTE_CODE,
    CHAT_TEMPLATE_PATH,
    honour("dataset_num_proc", None, "processes that tokenize"),
    honour("eos_token", None, "must be in the vocabulary"),
    honour("max_length", 1024, "rows of which either answer is longer are left out"),
    honour("center_rewards_coefficient", None, "pulls the sum of a pair's rewards to 0"),
    DISABLE_DROPOUT,
    PAD_TO_MULTIPLE_OF,
    honour("pad_token", None, "must be in the vocabulary"),
    ignore("activation_offloading", False, "has no place to offload to in unified memory"),
    # Fields of TrainingArguments that mean something else under this trainer.
    ignore("label_smoothing_factor", 0.0, "is not read by TRL's reward loss"),
    refuse("neftune_noise_alpha", None, "puts no noise on a reward model here", write="neftune_noise_alpha=None"),
    SAMPLING,
)


def resolve_scored_data(values: Mapping[str, Any]) -> DataPlan:
    """Length, padding, tokens and processes."""
    return DataPlan(
        max_length=check_optional_count("max_length", values["max_length"], "max_length=1024, or None", low=1),
        pad_to_multiple_of=resolve_multiple(values["pad_to_multiple_of"]),
        eos_token=values["eos_token"],
        pad_token=values["pad_token"],
        chat_template_path=values["chat_template_path"],
        dataset_num_proc=check_optional_count("dataset_num_proc", values["dataset_num_proc"], "dataset_num_proc=4"),
        seed=int(values["seed"]),
    )


def resolve_score_loss(values: Mapping[str, Any]) -> ScoreLossPlan:
    """What a reward model minimises.

    Raises:
        SettingError: A number is out of range.
    """
    coefficient = values["center_rewards_coefficient"]
    return ScoreLossPlan(
        center_rewards_coefficient=None
        if coefficient is None
        else check_number(
            "center_rewards_coefficient", coefficient, "center_rewards_coefficient=0.01", low=float("-inf")
        ),
        disable_dropout=check_flag("disable_dropout", values["disable_dropout"]),
    )
