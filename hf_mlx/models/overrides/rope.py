"""Rotary embeddings as transformers computes them: longrope, yarn, and everywhere its frequencies."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

Config = dict[str, Any]


class LongRope(nn.Module):
    """Rotary embedding with per-frequency factors chosen by the length of the sequence.

    Source: transformers 5.23 ``modeling_rope_utils._compute_longrope_parameters`` and
    ``longrope_frequency_update``. mlx-lm 0.32 ``SuScaledRoPE`` always takes the long factors.

    Args:
        dims: Rotated features.
        base: rope_theta.
        short, long: One factor for each frequency, ``dims / 2`` of them.
        original: original_max_position_embeddings, in tokens.
        scale: Attention factor; multiplies queries and keys.
    """

    def __init__(self, dims: int, base: float, short: list, long: list, original: int, scale: float) -> None:
        super().__init__()
        freqs = base ** (mx.arange(0, dims, 2, dtype=mx.float32) / dims)
        # Underscored: mlx keeps such arrays out of parameters().
        self._short = mx.array(short, dtype=mx.float32) * freqs
        self._long = mx.array(long, dtype=mx.float32) * freqs
        self.dims, self.original, self.scale = dims, original, scale

    def __call__(self, x: mx.array, offset: int = 0) -> mx.array:
        freqs = self._long if x.shape[-2] + offset > self.original else self._short
        if self.scale != 1.0:
            head = x[..., : self.dims] * self.scale
            x = mx.concatenate([head, x[..., self.dims :]], axis=-1) if self.dims < x.shape[-1] else head
        return mx.fast.rope(x, self.dims, traditional=False, base=None, scale=1.0, offset=offset, freqs=freqs)


class TabulatedRoPE(nn.RoPE):
    """``nn.RoPE`` with the frequencies of transformers 5.23 ``compute_default_rope_parameters``.

    ``mx.fast.rope`` takes each as an exponential of a product, up to 1.2e-6 off in float32, which at position 8,192 is
    5e-4 of an angle (mlx 0.32.4); with these an angle is transformers' to 3e-7, on every backend and at the same cost.
    """

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        freqs = _frequencies(float(self.base), self.dims)
        return mx.fast.rope(
            x, self.dims, traditional=self.traditional, base=None, scale=self.scale, offset=offset, freqs=freqs
        )


def tabulate_frequencies(model: Any) -> None:
    """Makes every plain rotary embedding of ``model`` a :class:`TabulatedRoPE`, in place."""
    for module in model.modules():
        if type(module) is nn.RoPE:
            module.__class__ = TabulatedRoPE


@cache
def _frequencies(base: float, dims: int) -> mx.array:
    """base^(2 i / dims), (dims / 2,) float32, rounded once; exponents are rounded before, as transformers' are."""
    exponents = np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims)
    return mx.array((base ** exponents.astype(np.float64)).astype(np.float32))


def apply(model: Any, config: Config) -> None:
    """Replaces mlx-lm's longrope modules, in every block that has one, and sets yarn's frequencies."""
    config = config.get("text_config") or config
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    # Where each kind of attention has an entry of its own, the others are of no kind that is built as yarn.
    for entry in (rope, *(entry for entry in rope.values() if isinstance(entry, dict))):
        if entry.get("rope_type", entry.get("type")) == "yarn":
            # transformers looks for it beside the entries, not in them.
            _set_yarn(model, config, {**entry, "truncate": rope.get("truncate", True)})
    if rope.get("rope_type", rope.get("type")) not in ("longrope", "su"):
        return
    original = (
        rope.get("original_max_position_embeddings")
        or config.get("original_max_position_embeddings")
        or config["max_position_embeddings"]
    )
    for block in model.layers:
        # Hybrids have layers without attention, and some models turn nothing.
        if getattr(getattr(block, "self_attn", None), "rope", None) is None:
            continue
        dims = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        dims = int(dims * (rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0))
        block.self_attn.rope = LongRope(
            dims,
            rope.get("rope_theta") or config.get("rope_theta") or 10_000.0,
            rope["short_factor"],
            rope["long_factor"],
            original,
            _attention_factor(rope, config["max_position_embeddings"] / original, original),
        )


def _set_yarn(model: Any, config: Config, rope: Config) -> None:
    """yarn as transformers 5.23 ``_compute_yarn_parameters`` has it: mlx-lm knows neither ``truncate`` nor
    ``attention_factor``.
    """
    # mlx_lm imports transformers and with it torch.
    from mlx_lm.models.deepseek_v2 import DeepseekV2YarnRotaryEmbedding
    from mlx_lm.models.rope_utils import YarnRoPE

    base, factor = rope.get("rope_theta") or config["rope_theta"], rope.get("factor")
    original = rope["original_max_position_embeddings"]
    factor = config["max_position_embeddings"] / original if factor is None else factor
    for _, module in model.named_modules():
        if isinstance(module, (YarnRoPE, DeepseekV2YarnRotaryEmbedding)):
            dims = 2 * module._freqs.size
            low, high = (
                dims * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))
                for turns in (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1)
            )
            if rope["truncate"]:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, dims - 1)
            ramp = (mx.arange(dims // 2, dtype=mx.float32) - low) / (high - low if high != low else 0.001)
            ramp = mx.clip(ramp, 0, 1)
            freqs = base ** (mx.arange(0, dims, 2, dtype=mx.float32) / dims)
            module._freqs = 1.0 / (ramp / (factor * freqs) + (1.0 - ramp) / freqs)
            module.mscale = _yarn_scale(rope, factor)


def _yarn_scale(rope: Config, factor: float) -> float:
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])

    def scale(strength: float) -> float:
        return 0.1 * strength * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return scale(rope["mscale"]) / scale(rope["mscale_all_dim"])
    return scale(1.0)


def _attention_factor(rope: Config, ratio: float, original: int) -> float:
    factor = rope.get("factor") or ratio
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1.0 else 1.0


def rotate_part(model: Any, config: Config) -> None:
    """GLM: only the first ``head_dim · partial_rotary_factor`` features turn, in pairs.

    Source: transformers 5.23 ``modeling_glm.apply_rotary_pos_emb``; mlx-lm turns all of them.
    """
    rope = config.get("rope_parameters") or {}
    dims = int(config["head_dim"] * rope.get("partial_rotary_factor", 0.5))
    for block in model.layers:
        block.self_attn.rope = nn.RoPE(dims, traditional=True, base=rope["rope_theta"])


def rotate_part_by_kind(model: Any, config: Config) -> None:
    """MiMo-V2-Flash: layers of each kind turn their own part of a head; mlx-lm turns the same one in all.

    Source: transformers 5.23 ``MiMoV2FlashRotaryEmbedding.compute_default_rope_parameters``.
    """
    for block, kind in zip(model.layers, config["layer_types"], strict=True):
        entry = config["rope_parameters"][kind]
        dims = int(config["head_dim"] * entry.get("partial_rotary_factor", 0.334))
        block.self_attn.rope = nn.RoPE(dims, traditional=False, base=entry["rope_theta"])


def pair_as_configured(model: Any, config: Config) -> None:
    """Latent attention: which features turn together, neighbours or halves; mlx-lm always takes neighbours."""
    for block in model.layers:
        block.self_attn.rope.traditional = config.get("rope_interleave", True)
