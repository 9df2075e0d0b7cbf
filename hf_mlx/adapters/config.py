"""adapter_config.json, out and in: every key that PEFT 0.21 writes for LoRA."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..errors import AdapterError
from ..settings.plan import LoraPlan
from .adapter import Adapter
from .decomposed import KINDS
from .matching import pattern_value

FORMAT = "0.21.2"

# Every key PEFT writes, at the value that means "not used".
_UNUSED: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "corda_config": None,
    "eva_config": None,
    "kasa_config": None,
    "layer_replication": None,
    "loftq_config": {},
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "monteclora_config": None,
    "qalora_group_size": 16,
    "use_bdlora": None,
    "use_qalora": False,
    "velora_config": None,
}
# These cannot change what a LoRA adapter computes.
_IDLE = {"megatron_core", "qalora_group_size", "runtime_config", "peft_version", "auto_mapping"}
_IDLE |= {"base_model_name_or_path", "revision", "inference_mode", "peft_type", "loftq_config"}


def config_to_json(adapter: Adapter, base: str, revision: str | None) -> dict[str, Any]:
    """The content of adapter_config.json, keys in PEFT's (alphabetical) order."""
    plan = adapter.plan
    selector = adapter.blueprint.selector
    config = {
        **_UNUSED,
        "alpha_pattern": {key: _number(value) for key, value in _order_free(adapter, plan.alpha_pattern).items()},
        "auto_mapping": _auto_mapping(adapter) if plan.task_type is None else plan.auto_mapping,
        "base_model_name_or_path": base,
        "bias": plan.bias,
        "ensure_weight_tying": plan.ensure_weight_tying,
        "exclude_modules": _names(plan.exclude_modules),
        "fan_in_fan_out": adapter.conv1d,
        "inference_mode": True,
        "init_lora_weights": plan.init_lora_weights,
        "layers_pattern": _names(plan.layers_pattern),
        "layers_to_transform": _names(plan.layers_to_transform),
        "lora_alpha": _number(plan.lora_alpha),
        "lora_bias": plan.lora_bias,
        "lora_dropout": plan.lora_dropout,
        "modules_to_save": _names(plan.modules_to_save),
        "peft_type": "LORA",
        "peft_version": FORMAT,
        "r": plan.r,
        "rank_pattern": _order_free(adapter, plan.rank_pattern),
        "revision": plan.revision or revision,
        "target_modules": _names(selector),
        "target_parameters": _names(plan.target_parameters),
        "task_type": plan.task_type,
        "trainable_token_indices": _indices_to_json(plan.trainable_token_indices),
        "use_dora": plan.use_dora,
        "use_rslora": plan.use_rslora,
    }
    return dict(sorted(config.items()))


def config_from_json(config: Mapping[str, Any], source: str) -> LoraPlan:
    """The plan that an adapter_config.json describes.

    Args:
        config: The parsed file.
        source: Its path, for messages.

    Raises:
        AdapterError: Not LoRA, a value of the wrong type, or a feature that is not supported here.
    """
    if config.get("peft_type") != "LORA":
        raise AdapterError(
            f"{source}: peft_type={config.get('peft_type')!r}",
            'a LoRA adapter, peft_type="LORA"',
            "import_adapter takes what LoraConfig trained",
        )
    known = {name for name in LoraPlan.__dataclass_fields__ if name not in _UNUSED and name not in _IDLE}
    for key, value in config.items():
        if key in known or key in _IDLE or value in (None, False, [], {}) or value == _UNUSED.get(key, _UNUSED):
            continue
        raise AdapterError(
            f"{source}: {key}={value!r}",
            "a plain LoRA or DoRA adapter (this feature is not supported here)",
            "convert it with PEFT first, or merge it there: model.merge_and_unload()",
        )
    for key in ("base_model_name_or_path", "revision"):
        if not isinstance(config.get(key), (str, type(None))):
            raise AdapterError(
                f"{source}: {key}={config[key]!r}"[:200], f"{key} as a string or null", "the name of the base model"
            )
    try:
        plan = LoraPlan(**{name: _read(name, config[name]) for name in known if config.get(name) is not None})
    except (TypeError, ValueError) as error:
        raise AdapterError(
            f"{source}: {error}",
            "the types and ranges that PEFT trains with",
            "the adapter_config.json that was saved with these weights",
        ) from error
    if plan.init_lora_weights not in (True, False, "gaussian", *KINDS):
        raise AdapterError(
            f"{source}: init_lora_weights={plan.init_lora_weights!r}",
            "True, False, 'gaussian', 'pissa' or 'olora' (others change the base by chance or by data)",
            "convert it with PEFT: save_pretrained(dir, path_initial_model_for_weight_conversion=...)",
        )
    return plan


# Far beyond every rank and alpha that was ever trained with; a scale above it turns any weight into noise.
_LARGEST = 1_000_000

_TYPES: dict[str, Any] = {
    "r": int,
    "lora_alpha": (int, float),
    "lora_dropout": (int, float),
    "target_modules": (list, str),
    "target_parameters": list,
    "exclude_modules": (list, str),
    "rank_pattern": dict,
    "alpha_pattern": dict,
    "use_rslora": bool,
    "use_dora": bool,
    "bias": str,
    "lora_bias": bool,
    "ensure_weight_tying": bool,
    "init_lora_weights": (bool, str),
    "layers_to_transform": (list, int),
    "layers_pattern": (list, str),
    "modules_to_save": (list, str),
    "fan_in_fan_out": bool,
    "task_type": str,
    "trainable_token_indices": (list, dict),
}


def _read(name: str, value: Any) -> Any:
    types = _TYPES[name] if isinstance(_TYPES[name], tuple) else (_TYPES[name],)
    # In Python True is an int, too.
    wrong = bool not in types if isinstance(value, bool) else not isinstance(value, types)
    kind = int if name in ("layers_to_transform", "trainable_token_indices") else str
    wrong |= isinstance(value, list) and not all(
        isinstance(item, kind) and not isinstance(item, bool) for item in value
    )
    wrong |= name == "bias" and value not in ("none", "all", "lora_only")
    if wrong or not _is_sound(name, value):
        raise ValueError(f"{name}={value!r}"[:200])
    if name == "modules_to_save" and isinstance(value, str):
        return tuple(dict.fromkeys(value)) or None
    if name in ("layers_to_transform", "layers_pattern") and not isinstance(value, list):
        value = [value]
    return tuple(value) if isinstance(value, list) else value


def _is_sound(name: str, value: Any) -> bool:
    """Whether a value of the right type is one that an adapter can have been trained with."""
    if name in ("r", "lora_alpha"):
        return _is_rank(value) if name == "r" else _is_alpha(value)
    if name == "lora_dropout":
        return 0 <= value < 1
    if name in ("rank_pattern", "alpha_pattern"):
        fits = _is_rank if name == "rank_pattern" else _is_alpha
        return all(_compiles(key) and fits(number) for key, number in value.items())
    if name in ("target_modules", "exclude_modules") and isinstance(value, str):
        return _compiles(value)
    if name == "layers_to_transform":
        return all(0 <= layer <= _LARGEST for layer in (value if isinstance(value, list) else [value]))
    if name == "trainable_token_indices" and isinstance(value, dict):
        return all(isinstance(ids, list) and all(type(i) is int for i in ids) for ids in value.values())
    if name in ("layers_pattern", "modules_to_save"):
        return all(_compiles(part) for part in ([value] if isinstance(value, str) else value))
    return True


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _LARGEST


def _is_alpha(value: Any) -> bool:
    # A negative one subtracts what was learnt, which is how tasks are negated.
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 < abs(value) <= _LARGEST


def _compiles(pattern: Any) -> bool:
    try:
        return bool(re.compile(pattern))
    except (re.error, TypeError, RecursionError, OverflowError):
        return False


def _order_free(adapter: Adapter, patterns: Mapping[str, Any]) -> dict[str, Any]:
    """Patterns that mean the same in any order.

    The first match counts, but PEFT sorts the keys of adapter_config.json: patterns that overlap would come back
    with another meaning, so those are written out module by module.
    """
    paths = [target.parameter for target in adapter.targets]
    reordered = dict(sorted(patterns.items()))
    if all(pattern_value(patterns, path, None) == pattern_value(reordered, path, None) for path in paths):
        return dict(patterns)
    found = {re.escape(path): pattern_value(patterns, path, None) for path in paths}
    return {key: value for key, value in found.items() if value is not None}


def _indices_to_json(indices: Any) -> Any:
    if isinstance(indices, Mapping):
        return {name: list(ids) for name, ids in indices.items()}
    return None if indices is None else list(indices)


def _names(value: tuple | str | None) -> list | str | None:
    return list(value) if isinstance(value, tuple) else value


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


def _auto_mapping(adapter: Adapter) -> dict[str, str] | None:
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    architectures = adapter.loaded.config.get("architectures")
    if not architectures:
        return None
    module = model_type_to_module_name(adapter.loaded.model_type)
    parent = f"transformers.models.{module}.modeling_{module}"
    return {"base_model_class": architectures[0], "parent_library": parent}
