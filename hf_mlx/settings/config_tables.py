"""The configuration class of a trainer as rules: what its fields do here, and how they are resolved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .data_plan import resolve_data
from .dpo_config import DPO_CONFIG, DPO_DEFAULTS, resolve_pair_data, resolve_pair_loss
from .lm_config import LM_CONFIG, resolve_language_loss, resolve_rows
from .plan import AnyLossPlan
from .reward_config import REWARD_CONFIG, REWARD_DEFAULTS, resolve_score_loss, resolve_scored_data
from .run_plan import resolve_loss
from .sft_config import SFT_CONFIG, SFT_DEFAULTS
from .training_arguments import TRAINING_ARGUMENTS
from .verdicts import Rule


@dataclass(frozen=True)
class ConfigTable:
    """One configuration class; all of them hold the fields of ``TrainingArguments``.

    Attributes:
        name: The class's.
        rules: A rule for each field that it adds to ``TrainingArguments``, or that means something else there.
        defaults: Fields of ``TrainingArguments`` that it gives another default.
        resolve_data: The values of all fields -> how rows become tokens.
        resolve_loss: The values of all fields -> what is minimised.
        scores: The model is loaded with a score in the place of its vocabulary head.
    """

    name: str
    rules: tuple[Rule, ...]
    defaults: Mapping[str, Any]
    resolve_data: Callable[[Mapping[str, Any]], Any]
    resolve_loss: Callable[[Mapping[str, Any]], AnyLossPlan]
    scores: bool = False

    @property
    def all_rules(self) -> dict[str, Rule]:
        """The rules of every field, by its name."""
        return {rule.field: rule for rule in (*TRAINING_ARGUMENTS, *self.rules)}


def choose_table(settings: Any) -> ConfigTable:
    """The table of a configuration object, by its class, or of a dict, by a field that one class alone has."""
    if isinstance(settings, Mapping):
        # A reward model has the fields of both, but for one of its own.
        if "center_rewards_coefficient" in settings:
            return REWARD_TABLE
        own = {rule.field for rule in DPO_CONFIG} - SFT_TABLE.all_rules.keys()
        return SFT_TABLE if own.isdisjoint(settings) else DPO_TABLE
    names = [cls.__name__ for cls in type(settings).__mro__]
    return next((table for table in (REWARD_TABLE, DPO_TABLE, SFT_TABLE, LM_TABLE) if table.name in names), SFT_TABLE)


SFT_TABLE = ConfigTable("SFTConfig", SFT_CONFIG, SFT_DEFAULTS, resolve_data, resolve_loss)
LM_TABLE = ConfigTable("TrainingArguments", LM_CONFIG, {}, resolve_rows, resolve_language_loss)
DPO_TABLE = ConfigTable("DPOConfig", DPO_CONFIG, DPO_DEFAULTS, resolve_pair_data, resolve_pair_loss)
REWARD_TABLE = ConfigTable(
    "RewardConfig", REWARD_CONFIG, REWARD_DEFAULTS, resolve_scored_data, resolve_score_loss, scores=True
)
