"""Zero-centred RMSNorm: the stored weight stays what transformers stores, the 1 is added in fp32."""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..cpu_norms import rms_norm


class ZeroCentredRMSNorm(nn.RMSNorm):
    """x / rms(x) · (1 + w), as transformers 5.23 ``Qwen3NextRMSNorm``: computed in fp32, cast at the end.

    Folding the 1 into a bf16 weight, as mlx-lm does on loading, would round w to steps of 1/128.
    """

    def __call__(self, x: mx.array) -> mx.array:
        weight = 1.0 + self.weight.astype(mx.float32)
        return rms_norm(x.astype(mx.float32), weight, self.eps).astype(x.dtype)


def centre_at_zero(model: Any) -> None:
    """Makes every plain RMSNorm of ``model`` zero-centred (gated norms are other classes and stay)."""
    for _, module in model.named_modules():
        if type(module) is nn.RMSNorm:
            module.__class__ = ZeroCentredRMSNorm


def group_gated_norms(model: Any, config: dict[str, Any]) -> None:
    """Mamba-2 mixers: the gated norm runs within each of ``n_groups`` groups of features.

    Source: transformers 5.23 ``GraniteMoeHybridRMSNormGated``; mlx-lm norms over all features at once.
    """
    groups: int = config["mamba_n_groups"] if "mamba_n_groups" in config else config["n_groups"]
    for block in model.layers:
        mixer = block.get("mixer", block.get("mamba"))
        if mixer is not None and groups > 1:
            mixer.norm.__class__ = _grouped(type(mixer.norm))
            mixer.norm.groups = groups


@cache
def _grouped(norm: type[Any]) -> type[Any]:
    class Grouped(norm):
        def __call__(self, hidden: mx.array, gate: mx.array | None = None) -> mx.array:
            dtype = hidden.dtype
            hidden = hidden.astype(mx.float32)
            if gate is not None:
                hidden = hidden * nn.silu(gate.astype(mx.float32))
            parts = mx.unflatten(hidden, -1, (self.groups, -1))
            parts = rms_norm(parts, None, self.eps)
            return self.weight * mx.flatten(parts, -2, -1).astype(dtype)

    Grouped.__name__ = f"Grouped{norm.__name__}"
    return Grouped


def use_default_latent_epsilon(model: Any, config: dict[str, Any]) -> None:
    """Latent attention: the norms of the compressed queries and keys keep RMSNorm's default epsilon.

    Source: transformers 5.23 ``Glm4MoeLiteAttention``, ``KimiLinearAttention``, ``LongcatFlashMLA`` (1e-6, whatever
    rms_norm_eps is).
    """
    for name, module in model.named_modules():
        if name.endswith(("q_a_layernorm", "kv_a_layernorm")):
            module.eps = 1e-6


def use_configured_epsilon(model: Any, config: dict[str, Any]) -> None:
    """Mamba: layer_norm_epsilon is that of the blocks' norms and of the last one, where mlx-lm keeps its own."""
    for _, module in model.named_modules():
        if type(module) is nn.RMSNorm:
            module.eps = config.get("layer_norm_epsilon", 1e-5)


class NormedRope(nn.Module):
    """A rotary embedding followed by an RMS norm without weight."""

    def __init__(self, rope: Any, eps: float) -> None:
        super().__init__()
        self.rope, self.eps = rope, eps

    def __call__(self, x: mx.array, offset: int = 0) -> mx.array:
        return rms_norm(self.rope(x, offset=offset), None, self.eps)


def norm_queries_with_configured_epsilon(model: Any, config: dict[str, Any]) -> None:
    """Llama 4: queries and keys are normed with rms_norm_eps (transformers 5.23 ``Llama4TextL2Norm``), not 1e-6."""
    eps = config.get("text_config", config)["rms_norm_eps"]
    for block in model.layers:
        attention = block.self_attn
        if attention.use_qk_norm:
            attention.rope, attention.use_qk_norm = NormedRope(attention.rope, eps), False
