"""OPT, which mlx-lm does not have: learned positions that begin at 2, norms before or after each part.

Source: transformers 5.23 ``modeling_opt``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import BaseModelArgs, create_attention_mask, scaled_dot_product_attention

from .activations import ACTIVATIONS
from .with_head import WithHead

_FIRST_POSITION = 2


@dataclass
class ModelArgs(BaseModelArgs):
    """Keys of ``OPTConfig``."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    ffn_dim: int
    max_position_embeddings: int
    word_embed_proj_dim: int
    do_layer_norm_before: bool = True
    _remove_final_layer_norm: bool = False
    activation_function: str = "relu"
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    tie_word_embeddings: bool = True


class Attention(nn.Module):
    """Multi-head attention."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.heads = args.num_attention_heads
        self.scale = (args.hidden_size // self.heads) ** -0.5
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (
            nn.Linear(args.hidden_size, args.hidden_size, bias=args.enable_bias) for _ in range(4)
        )

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        batch, length, _ = x.shape
        q, k, v = (
            p(x).reshape(batch, length, self.heads, -1).swapaxes(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        out = scaled_dot_product_attention(q, k, v, cache=cache, scale=self.scale, mask=mask)
        return self.out_proj(out.swapaxes(1, 2).reshape(batch, length, -1))


class Block(nn.Module):
    """One layer."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.first, self.activation = args.do_layer_norm_before, args.activation_function
        self.self_attn = Attention(args)
        self.self_attn_layer_norm = _norm(args)
        self.fc1 = nn.Linear(args.hidden_size, args.ffn_dim, bias=args.enable_bias)
        self.fc2 = nn.Linear(args.ffn_dim, args.hidden_size, bias=args.enable_bias)
        self.final_layer_norm = _norm(args)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        if self.first:
            x = x + self.self_attn(self.self_attn_layer_norm(x), mask, cache)
            return x + self._feed_forward(self.final_layer_norm(x))
        x = self.self_attn_layer_norm(x + self.self_attn(x, mask, cache))
        return self.final_layer_norm(x + self._feed_forward(x))

    def _feed_forward(self, x: mx.array) -> mx.array:
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class Positions(nn.Module):
    """A row for each position. No ``nn.Embedding``: PEFT's LoRA of one would look up something else than torch does."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.weight = mx.zeros((args.max_position_embeddings + _FIRST_POSITION, args.hidden_size))

    def __call__(self, positions: mx.array) -> mx.array:
        return self.weight[positions + _FIRST_POSITION]


class OPTModel(nn.Module):
    """The decoder."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.word_embed_proj_dim)
        self.embed_positions = Positions(args)
        if args.word_embed_proj_dim != args.hidden_size:
            self.project_out = nn.Linear(args.hidden_size, args.word_embed_proj_dim, bias=False)
            self.project_in = nn.Linear(args.word_embed_proj_dim, args.hidden_size, bias=False)
        if args.do_layer_norm_before and not args._remove_final_layer_norm:
            self.final_layer_norm = _norm(args)
        self.layers = [Block(args) for _ in range(args.num_hidden_layers)]

    def __call__(self, inputs: mx.array, cache: Any = None, input_embeddings: mx.array | None = None) -> mx.array:
        x = self.embed_tokens(inputs) if input_embeddings is None else input_embeddings
        cache = [None] * len(self.layers) if cache is None else cache
        if "project_in" in self:
            x = self.project_in(x)
        offset = 0 if cache[0] is None else cache[0].offset
        x = x + self.embed_positions(mx.arange(offset, offset + x.shape[1]))
        mask = create_attention_mask(x, cache[0])
        for block, entry in zip(self.layers, cache, strict=True):
            x = block(x, mask, entry)
        if "final_layer_norm" in self:
            x = self.final_layer_norm(x)
        return self.project_out(x) if "project_out" in self else x


class Model(WithHead):
    """OPT with its head."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args, OPTModel(args))


def classes() -> tuple[type[Any], type]:
    """What builds it."""
    return Model, ModelArgs


def _norm(args: ModelArgs) -> nn.LayerNorm:
    return nn.LayerNorm(args.hidden_size, eps=1e-5, affine=args.layer_norm_elementwise_affine)
