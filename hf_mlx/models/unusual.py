"""Which of a config's options can be why a model cannot be built from it."""

from __future__ import annotations

from typing import Any

from ..intake import show
from .config import Config

# What a file says about itself, and what no layer is built by.
_ABOUT = """
    architectures dtype torch_dtype transformers_version model_type _name_or_path use_cache quantization
    quantization_config bos_token_id eos_token_id pad_token_id text_config vision_config audio_config
"""


def unusual_options(config: Config) -> str:
    """The switches (no sizes) that differ from the default of their class in transformers, each as ``key=value``.

    Args:
        config: What :func:`hf_mlx.models.config.interpret` returned.

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
    switches = [
        f"{key}={show(value)}"
        for key, value in text.items()
        if key not in _ABOUT.split()
        and value != usual.get(key)
        and (value in (0, 1) or not isinstance(value, int | float))
    ]
    return "; config.json has " + ", ".join(switches) if switches else ""
