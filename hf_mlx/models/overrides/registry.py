"""Which override belongs to which model type. Override modules are imported only when their type is loaded."""

from __future__ import annotations

import importlib
from typing import Any

from ..cpu_norms import add_exactly
from . import norms, rope, windows

Config = dict[str, Any]

# model type → "module:function", one or several; called as function(model, config) after loading.
_INSTANCES: dict[str, str | tuple[str, ...]] = {
    "gemma": "activations:use_configured",
    "starcoder2": "activations:use_configured",
    "gpt_bigcode": ("activations:use_configured", "gpt_bigcode:read_by_head"),
    "gpt_neox": "activations:use_configured",
    **dict.fromkeys(("cwm", "llama", "ministral", "mistral"), "activations:use_configured"),
    "nanochat": "nanochat:turn_backwards",
    "glm": "rope:rotate_part",
    "mimo_v2_flash": "rope:rotate_part_by_kind",
    **dict.fromkeys(("mamba", "falcon_mamba"), "norms:use_configured_epsilon"),
    "mamba2": ("norms:use_configured_epsilon", "norms:group_gated_norms"),
    "granitemoehybrid": "norms:group_gated_norms",
    "longcat_flash": "norms:use_default_latent_epsilon",
    "glm4_moe_lite": ("norms:use_default_latent_epsilon", "rope:pair_as_configured"),
    "deepseek_v3": "rope:pair_as_configured",
    "kimi_linear": ("norms:use_default_latent_epsilon", "kimi:allow_no_attention"),
    "llama4": "norms:norm_queries_with_configured_epsilon",
    "llama4_text": "norms:norm_queries_with_configured_epsilon",
    "gpt_oss": "activations:clamp_as_configured",
    "minicpm3": "minicpm:correct",
    "jamba": "experts:keep_router_weights",
    "gemma2": "gemma:attend_with_softcap",
    "gemma3_text": "gemma:scale_embeddings_exactly",
    "gemma3": "gemma:scale_embeddings_exactly",
}

# Types whose RMSNorm is x·(1 + w) in transformers, while mlx-lm folds the 1 into the weight on loading.
_ZERO_CENTRED = frozenset({"qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"})

# Types with layers that mlx-lm runs token by token, or with Mamba-2's squares for every 256 tokens.
_RECURRENT = frozenset(
    {"falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "kimi_linear", "mamba", "mamba2", "nemotron_h"}
    | {"olmo_hybrid", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"}
)

# model type → "module:function"; called as function() and returns (Model, ModelArgs).
_CLASSES: dict[str, str] = {
    "arcee": "arcee:classes",
    "bitnet": "bitnet:classes",
    "cwm": "llama:classes",
    "ernie4_5_moe": "ernie:classes",
    "falcon": "falcon:classes",
    "ministral": "llama:classes",
    "nanochat": "nanochat:classes",
    "olmo": "olmo:classes",
    "opt": "opt:classes",
    "qwen3_vl_moe": "multimodal:qwen3_vl_moe_classes",
}


def model_classes(model_type: str) -> tuple[type[Any], type] | None:
    """The (Model, ModelArgs) that replace mlx-lm's for this type, or None."""
    target = _CLASSES.get(model_type)
    return _resolve(target)() if target else None


def adapt(model: Any, config: Config, converted: bool) -> None:
    """Changes a loaded model in place so that it computes what transformers computes.

    Args:
        model: The mlx-lm model.
        config: The HF config as transformers reads it.
        converted: Whether the weights lie under our own layout steps (an unquantised HF checkpoint), which
            keep zero-centred norm weights as they are; mlx-lm's own conversion adds 1.
    """
    windows.apply(model, config)
    rope.apply(model, config)
    targets = _INSTANCES.get(config["model_type"], ())
    for target in (targets,) if isinstance(targets, str) else targets:
        _resolve(target)(model, config)
    if config["model_type"] in _RECURRENT:
        _resolve("recurrent:apply")(model)
    if converted and config["model_type"] in _ZERO_CENTRED:
        norms.centre_at_zero(model)
    rope.tabulate_frequencies(model)
    _resolve("activations:round_as_configured")(model, config)
    add_exactly(model)


def _resolve(target: str) -> Any:
    module, name = target.split(":")
    return getattr(importlib.import_module(f"{__package__}.{module}"), name)
