"""Which weights are loaded, in which dtype, and what is trained on top of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import SettingError
from .ledger import complete_adapter
from .plan import LoraPlan, ModelPlan, PrecisionPlan
from .quantization import GROUP_SIZE, read_bits
from .ranges import check_count, check_flag, check_number, check_pattern, check_strings

_RANKS = 2**20  # more than any layer is wide; what lies above is a slip, and would only run out of memory


def resolve_model(values: Mapping[str, Any]) -> ModelPlan:
    """The base: revision, dtype, quantization.

    A model that is named by a string loads in float32 unless ``model_init_kwargs`` says otherwise (trl 1.16,
    ``create_model_from_path``).
    """
    kwargs = values["model_init_kwargs"] or {}
    dtype = kwargs["dtype"] if "dtype" in kwargs else kwargs.get("torch_dtype", "float32")
    bf16 = check_flag("bf16", values["bf16"])
    return ModelPlan(
        revision=kwargs.get("revision"),
        token=kwargs.get("token"),
        trust_remote_code=bool(values["trust_remote_code"] or kwargs.get("trust_remote_code")),
        quantization_bits=read_bits(kwargs.get("quantization_config") or {}) or read_bits(kwargs),
        quantization_group_size=GROUP_SIZE,
        precision=PrecisionPlan(dtype=dtype or "auto", autocast="bfloat16" if bf16 else None),
    )


def resolve_lora(peft_config: Any) -> LoraPlan | None:
    """A LoraConfig as plain values; None stays None, which is full fine-tuning.

    Raises:
        SettingError: A number is out of range, or nothing would be trained.
    """
    if peft_config is None:
        return None
    values = complete_adapter(peft_config)
    _check_targets(values)
    _check_patterns(values)
    return LoraPlan(
        r=check_count("r", values["r"], "r=8", below=_RANKS),
        lora_alpha=check_number("lora_alpha", values["lora_alpha"], "lora_alpha=16", above=0.0),
        lora_dropout=check_number("lora_dropout", values["lora_dropout"], "lora_dropout=0.05", below=1.0),
        target_modules=check_strings("target_modules", values["target_modules"]),
        target_parameters=_several("target_parameters", values["target_parameters"]),
        exclude_modules=check_strings("exclude_modules", values["exclude_modules"]),
        rank_pattern={
            key: check_count(f"rank_pattern[{key!r}]", rank, f'rank_pattern={{"{key}": 8}}', below=_RANKS)
            for key, rank in _pattern(values, "rank_pattern").items()
        },
        alpha_pattern={
            key: check_number(f"alpha_pattern[{key!r}]", alpha, f'alpha_pattern={{"{key}": 16}}', above=0.0)
            for key, alpha in _pattern(values, "alpha_pattern").items()
        },
        use_rslora=check_flag("use_rslora", values["use_rslora"]),
        use_dora=check_flag("use_dora", values["use_dora"]),
        bias=values["bias"],
        lora_bias=check_flag("lora_bias", values["lora_bias"]),
        init_lora_weights=values["init_lora_weights"],
        layers_to_transform=_resolve_layers(values["layers_to_transform"]),
        layers_pattern=_several("layers_pattern", values["layers_pattern"]),
        modules_to_save=_spelled("modules_to_save", values["modules_to_save"]),
        trainable_token_indices=_resolve_indices(values["trainable_token_indices"]),
        ensure_weight_tying=check_flag("ensure_weight_tying", values["ensure_weight_tying"]),
        fan_in_fan_out=check_flag("fan_in_fan_out", values["fan_in_fan_out"]),
        task_type=values["task_type"],
        auto_mapping=values["auto_mapping"],
        revision=values["revision"],
    )


def resolve_last_layers(count: Any, lora: LoraPlan | None) -> int | None:
    """``finetune_last_n_layers``: None and mlx-lm's -1 are all layers."""
    if count is None or (count == -1 and not isinstance(count, bool)):
        return None
    if lora is not None and lora.layers_to_transform is not None:
        raise SettingError(
            f"finetune_last_n_layers={count!r} with layers_to_transform={list(lora.layers_to_transform)!r}",
            "the layers are chosen in one place",
            "write layers_to_transform alone, which PEFT reads too",
        )
    return check_count("finetune_last_n_layers", count, "finetune_last_n_layers=16")


def _check_patterns(values: Mapping[str, Any]) -> None:
    """Everything that PEFT 0.21 (``tuners_utils``, ``get_pattern_key``) reads as a regular expression."""
    for name in ("target_modules", "exclude_modules"):
        if isinstance(values[name], str) and values[name] != "all-linear":
            check_pattern(name, values[name])
    for name in ("rank_pattern", "alpha_pattern"):
        for key in _pattern(values, name):
            check_pattern(f"a key of {name}", str(key), r"(.*\.)?({})$")
    for key in _several("layers_pattern", values["layers_pattern"]) or ():
        check_pattern("layers_pattern", key, r".*\.{}\.(\d+)\.")
    for key in _several("modules_to_save", values["modules_to_save"]) or ():
        check_pattern("modules_to_save", key, r"(^|.*\.){}($|\..*)")


def _check_targets(values: Mapping[str, Any]) -> None:
    targets = values["target_modules"]
    if targets is not None and not targets and not values["target_parameters"]:
        raise SettingError(
            f"target_modules={targets!r}",
            "target_modules names at least one module, or nothing would be trained",
            'write target_modules="all-linear", or None for the architecture\'s own',
        )
    if isinstance(targets, str) and targets != "all-linear" and values["layers_to_transform"] is not None:
        raise SettingError(
            f"target_modules={targets!r} with layers_to_transform={values['layers_to_transform']!r}",
            "layers_to_transform goes with a list of names; a regex names its layers itself (PEFT raises too)",
            f"write target_modules=[{targets!r}]",
        )


def _pattern(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    pattern = values[name] or {}
    if isinstance(pattern, Mapping):
        return pattern
    raise SettingError(f"{name}={pattern!r}", f"{name} is a dict of name patterns", f'write {name}={{"q_proj": 16}}')


def _several(name: str, value: Any) -> tuple[str, ...] | None:
    strings = check_strings(name, value)
    return (strings,) if isinstance(strings, str) else strings


def _spelled(name: str, value: Any) -> tuple[str, ...] | None:
    # PEFT 0.21 iterates over modules_to_save whatever it is: a string stands for its letters.
    strings = check_strings(name, value)
    return tuple(dict.fromkeys(strings)) or None if isinstance(strings, str) else strings


def _resolve_indices(indices: Any) -> tuple[int, ...] | dict[str, tuple[int, ...]] | None:
    if isinstance(indices, Mapping):
        return {str(name): _resolve_ids(ids) for name, ids in indices.items()}
    return None if indices is None else _resolve_ids(indices)


def _resolve_ids(ids: Any) -> tuple[int, ...]:
    remedy = 'trainable_token_indices=[32000, 32001], or {"embed_tokens": [32000, 32001]}'
    if not isinstance(ids, (list, tuple)) or not ids:
        raise SettingError(f"trainable_token_indices={ids!r}", "ids of tokens in a list", f"write {remedy}")
    return tuple(check_count("trainable_token_indices", index, remedy, low=0) for index in ids)


def _resolve_layers(layers: Any) -> tuple[int, ...] | None:
    if layers is None:
        return None
    listed = layers if isinstance(layers, (list, tuple)) else [layers]
    return tuple(check_count("layers_to_transform", layer, "layers_to_transform=[0, 1]", low=0) for layer in listed)
