"""What a model that was handed over decides of the settings."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

from ..data.tables import Tables
from ..errors import SettingError
from ..models.bridge import TorchModel
from ..models.positions import row_limit

logger = logging.getLogger(__name__)


def read_tables(config: Mapping[str, Any]) -> Tables:
    """Ids and positions that a model of this config can embed."""
    ids = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    return Tables(ids, *row_limit(config))


def drop_init_kwargs(args: Any, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Set ``model_init_kwargs`` aside: they load a model by name, and this one is loaded already (trl ignores them)."""
    given = overrides.get("model_init_kwargs") or getattr(args, "model_init_kwargs", None)
    if not given:
        return dict(overrides)
    logger.warning("model_init_kwargs=%r is not used: the model was loaded by the script itself", given)
    return {**overrides, "model_init_kwargs": None}


def read_peft_config(source: TorchModel, peft_config: Any, last_n_layers: int | None) -> Any:
    """The LoraConfig to resolve: the trainer's own, or the one inside a PeftModel.

    Raises:
        SettingError: Both are given, or the layers are to be chosen after the fact.
    """
    if source.adapter is not None and peft_config is not None:
        raise SettingError(
            "a PeftModel together with peft_config",
            "one adapter (trl.SFTTrainer raises too)",
            "MLXSFTTrainer(model=peft_model, ...) without peft_config, or model=peft_model.merge_and_unload()",
        )
    if last_n_layers is not None and (source.adapter is not None or peft_config is not None):
        count = source.base.config.get_text_config().num_hidden_layers
        layers = list(range(count))[-last_n_layers:]
        raise SettingError(
            f"finetune_last_n_layers={last_n_layers} with a torch model",
            "layers that PEFT can put its own adapter on as well",
            f"LoraConfig(..., layers_to_transform={layers})",
        )
    if source.adapter is None:
        return peft_config
    config = copy.copy(source.peft_config)
    # The object's weights are the start; how they once came about says nothing any more.
    config.init_lora_weights = True
    return config
