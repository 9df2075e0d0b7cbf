"""Which of a config's options can be why a model cannot be built from it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ..intake import show
from .config import Config

# What a file says about itself, and what no layer is built by.
_ABOUT = """
    architectures dtype torch_dtype transformers_version model_type _name_or_path use_cache quantization
    quantization_config initializer_range bos_token_id eos_token_id pad_token_id text_config vision_config audio_config
"""
# No message names more.
_SHOWN = 24


def unusual_options(config: Config, known: Collection[str] = ()) -> str:
    """The options that differ from the default of their class in transformers, each as ``key=value``.

    Args:
        config: What :func:`hf_mlx.models.config.interpret` returned.
        known: Names that the MLX code takes: their sizes come last.

    Returns:
        ``"; config.json has key=value, …"``; empty where there is none, or transformers does not know the model type.
    """
    from transformers import CONFIG_MAPPING

    nested = config.get("text_config")
    text: dict[str, Any] = nested if isinstance(nested, dict) else config
    kind: Any = text.get("model_type")
    if kind not in CONFIG_MAPPING:
        return ""
    usual = CONFIG_MAPPING[kind]().to_dict()
    differing = {key: value for key, value in text.items() if key not in _ABOUT.split() and value != usual.get(key)}
    switches = {key: value for key, value in differing.items() if value in (0, 1) or not isinstance(value, int | float)}
    unread = {key: value for key, value in differing.items() if key not in known}
    found = [f"{key}={show(value)}" for key, value in {**switches, **unread, **differing}.items()][:_SHOWN]
    return "; config.json has " + ", ".join(found) if found else ""
