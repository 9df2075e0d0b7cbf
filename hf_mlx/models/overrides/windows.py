"""Sliding-window attention for the model types whose mlx-lm code attends to everything.

Each block asks for its own mask, so mixed layers work, and a cache that is passed in (generation,
packed rows) still decides what the mask is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import mlx.core as mx

Config = dict[str, Any]
Windows = list[int | None]


def _uniform(config: Config) -> Windows:
    return [config.get("sliding_window")] * config["num_hidden_layers"]


def _by_layer_type(config: Config) -> Windows:
    window, layers = config.get("sliding_window"), config["num_hidden_layers"]
    types = config.get("layer_types")
    if types is None:
        return [None] * layers
    return [window if t == "sliding_attention" else None for t in types]


def _qwen(config: Config) -> Windows:
    """Transformers 5.23 Qwen2Config: layers from max_window_layers on slide, if use_sliding_window."""
    layers = config["num_hidden_layers"]
    if not config.get("use_sliding_window") or not config.get("sliding_window"):
        return [None] * layers
    if config.get("layer_types") is not None:
        return _by_layer_type(config)
    first = config.get("max_window_layers", 28)
    return [config["sliding_window"] if i >= first else None for i in range(layers)]


def _qwen3_moe(config: Config) -> Windows:
    """Transformers 5.23 Qwen3MoeConfig: every layer slides, if use_sliding_window."""
    return _uniform(config) if config.get("use_sliding_window") else [None] * config["num_hidden_layers"]


def _dots1(config: Config) -> Windows:
    """Transformers 5.23 Dots1Config: layers from max_window_layers on slide, if there is a window."""
    return _qwen({"max_window_layers": 62, **config, "use_sliding_window": True})


def _gemma2(config: Config) -> Windows:
    if config.get("layer_types") is not None:
        return _by_layer_type(config)
    return [config["sliding_window"] if i % 2 == 0 else None for i in range(config["num_hidden_layers"])]


# Types whose windows mlx-lm drops; the others read them natively (gemma3, cohere2, olmo3, …).
WINDOWS: dict[str, Callable[[Config], Windows]] = {
    "mistral": _uniform,
    "mixtral": _uniform,
    "phi3": _uniform,
    "phimoe": _uniform,
    "starcoder2": _uniform,
    "qwen2": _qwen,
    "qwen2_5_vl_text": _qwen,
    "qwen2_vl_text": _qwen,
    "qwen3": _qwen,
    "qwen2_moe": _qwen,
    "qwen3_moe": _qwen3_moe,
    "smollm3": _qwen,
    "gemma2": _gemma2,
    "cwm": _by_layer_type,
    "dots1": _dots1,
    "ministral": _by_layer_type,
}


def apply(model: Any, config: Config) -> None:
    """Gives each block of ``model`` its own window (in tokens, the current one included)."""
    _pad_caches(model)
    text = config.get("text_config") or config
    rule = WINDOWS.get(config["model_type"]) or WINDOWS.get(text["model_type"])
    if rule is None:
        return
    for block, window in zip(model.layers, rule(text), strict=True):
        if window is not None:
            block.__class__ = _windowed(type(block))
            block.sliding_window = window


# Attributes in which mlx-lm keeps the first layer of a kind, which it asks for the mask of all of that kind.
_FIRST_OF_A_KIND = """
    fa_idx swa_idx ga_idx full_idx ssm_idx attn_idx conv_idx _fa_idx _lin_idx _first_full _first_sliding
"""


def _pad_caches(model: Any) -> None:
    """A model with fewer layers than its period has none of a kind: mlx-lm would look beyond its last layer."""
    for _, module in model.named_modules():
        if "layers" not in module:
            continue
        firsts = [getattr(module, name, None) for name in _FIRST_OF_A_KIND.split()]
        period = getattr(module, "sliding_window_pattern", None)
        period = getattr(getattr(module, "args", None), "sliding_window_pattern", None) if period is None else period
        needed = [first + 1 for first in firsts if isinstance(first, int)]
        needed += [period] if isinstance(period, int) else []
        if max(needed, default=0) > len(module.layers):
            module.__class__ = _padded(type(module), max(needed))


@cache
def _padded(inner: type[Any], period: int) -> type[Any]:
    class Padded(inner):
        def __call__(self, inputs: mx.array, cache: Any = None, *args: Any, **options: Any) -> mx.array:
            held = cache or [None] * len(self.layers)
            return super().__call__(inputs, [*held, *[None] * (period - len(held))], *args, **options)

    Padded.__name__ = f"Padded{inner.__name__}"
    return Padded


@cache
def _windowed(block: type[Any]) -> type[Any]:
    from mlx_lm.models.base import create_attention_mask

    class Windowed(block):
        def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
            # The caller's mask knows no window; this layer's comes from its own cache entry.
            return super().__call__(x, create_attention_mask(x, cache, window_size=self.sliding_window), cache)

    Windowed.__name__ = f"Windowed{block.__name__}"
    return Windowed
