"""What the dialects share: how one is registered, and what several of them set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...errors import ModelError

Config = dict[str, Any]
Dialect = Callable[[Config], Config]
DIALECTS: dict[str, Dialect] = {}


def speaks(*model_types: str) -> Callable[[Dialect], Dialect]:
    """Register the decorated function for these model types."""

    def register(function: Dialect) -> Dialect:
        DIALECTS.update(dict.fromkeys(model_types, function))
        return function

    return register


def fill(config: Config, **values: Any) -> None:
    """Set what the config leaves out or has as None."""
    for key, value in values.items():
        if config.get(key) is None:
            config[key] = value


def set_head_dim(config: Config) -> None:
    """Where it is left out, a head takes its share of the hidden size."""
    fill(config, head_dim=config["hidden_size"] // config["num_attention_heads"])


def sliding_period(config: Config) -> int:
    """Layers from one full-attention layer to the next (6 in Gemma 3): 1-based index of the first one."""
    types = config.get("layer_types")
    if types:
        period = types.index("full_attention") + 1 if "full_attention" in types else len(types) + 1
        if any((t == "full_attention") != ((i + 1) % period == 0) for i, t in enumerate(types)):
            raise ModelError(
                f"layer_types={types}",
                "full attention at a fixed period, which is all that mlx-lm's code of this type knows",
                "train this checkpoint with trl.SFTTrainer",
            )
        return period
    return config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6


def theta(config: Config, layer_type: str, default: float) -> float:
    """The base of the rotary frequencies of layers of one type."""
    rope = config.get("rope_parameters") or {}
    return (rope.get(layer_type) or {}).get("rope_theta", default)
