"""BitNet in floating point: a Llama with a norm before each output projection.

Source: transformers 5.23 ``modeling_bitnet``. Its ternary files are refused where quantised weights are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama
from mlx_lm.models.base import scaled_dot_product_attention

from .activations import ACTIVATIONS
from .llama import blocks_of


@dataclass
class ModelArgs(llama.ModelArgs):
    """mlx-lm's, and the activation."""

    hidden_act: str = "relu2"


class Attention(llama.Attention):
    """mlx-lm's, with the norm."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args)
        self.attn_sub_norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        batch, length, _ = x.shape
        q, k, v = (
            p(x).reshape(batch, length, -1, self.head_dim).swapaxes(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        offset = 0 if cache is None else cache.offset
        q, k = self.rope(q, offset=offset), self.rope(k, offset=offset)
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        out = scaled_dot_product_attention(q, k, v, cache=cache, scale=self.scale, mask=mask)
        return self.o_proj(self.attn_sub_norm(out.swapaxes(1, 2).reshape(batch, length, -1)))


class MLP(llama.MLP):
    """mlx-lm's, with the norm and the activation."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args)
        self.ffn_sub_norm = nn.RMSNorm(args.intermediate_size, eps=args.rms_norm_eps)
        self.activation = args.hidden_act

    def __call__(self, x: mx.array) -> mx.array:
        gated = ACTIVATIONS[self.activation](self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(self.ffn_sub_norm(gated))


class Model(llama.Model):
    """mlx-lm's Llama with these parts."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args)
        for block in blocks_of(self):
            block.self_attn, block.mlp = Attention(args), MLP(args)


def classes() -> tuple[type[Any], type]:
    """What builds it."""
    return Model, ModelArgs
