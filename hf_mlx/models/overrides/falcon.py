"""Falcon, which mlx-lm does not have: heads in groups, attention and MLP side by side or in turn, rotary or ALiBi.

Source: transformers 5.23 ``modeling_falcon`` with its default attention (its eager code adds ALiBi twice).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import BaseModelArgs, create_attention_mask, scaled_dot_product_attention
from mlx_lm.models.rope_utils import initialize_rope

from .activations import ACTIVATIONS
from .with_head import WithHead


@dataclass
class ModelArgs(BaseModelArgs):
    """Keys of ``FalconConfig``."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_kv_heads: int
    ffn_hidden_size: int
    max_position_embeddings: int = 2048
    layer_norm_epsilon: float = 1e-5
    activation: str = "gelu"
    alibi: bool = False
    new_decoder_architecture: bool = False
    num_ln_in_parallel_attn: int | None = None
    multi_query: bool = True
    parallel_attn: bool = True
    bias: bool = False
    rope_theta: float = 10_000.0
    rope_scaling: dict[str, Any] | None = None
    tie_word_embeddings: bool = True

    @property
    def groups(self) -> int:
        """Key-value heads."""
        if self.new_decoder_architecture:
            return self.num_kv_heads
        return 1 if self.multi_query else self.num_attention_heads

    @property
    def norms_apart(self) -> bool:
        """Whether attention and MLP, side by side, have a norm each."""
        count = self.num_ln_in_parallel_attn
        return self.new_decoder_architecture and (count is None or count == 2)


class Attention(nn.Module):
    """Queries of a group, then its key and its value, in one projection."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.heads, self.groups = args.num_attention_heads, args.groups
        self.head_dim = args.hidden_size // self.heads
        self.scale = self.head_dim**-0.5
        width = (self.heads + 2 * self.groups) * self.head_dim
        self.query_key_value = nn.Linear(args.hidden_size, width, bias=args.bias)
        self.dense = nn.Linear(args.hidden_size, args.hidden_size, bias=args.bias)
        self.rope: Any = None
        if not args.alibi:
            scaling, longest = args.rope_scaling, args.max_position_embeddings
            self.rope = initialize_rope(self.head_dim, args.rope_theta, False, scaling, longest)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        batch, length, _ = x.shape
        grouped = self.query_key_value(x).reshape(batch, length, self.groups, -1, self.head_dim)
        q = grouped[:, :, :, :-2].reshape(batch, length, self.heads, self.head_dim).swapaxes(1, 2)
        k, v = (grouped[:, :, :, i].swapaxes(1, 2) for i in (-2, -1))
        if self.rope is not None:
            offset = 0 if cache is None else cache.offset
            q, k = self.rope(q, offset=offset), self.rope(k, offset=offset)
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        out = scaled_dot_product_attention(q, k, v, cache=cache, scale=self.scale, mask=mask)
        return self.dense(out.swapaxes(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    """4h_to_h(act(h_to_4h(x)))."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(args.hidden_size, args.ffn_hidden_size, bias=args.bias)
        self.dense_4h_to_h = nn.Linear(args.ffn_hidden_size, args.hidden_size, bias=args.bias)
        self.activation = args.activation

    def __call__(self, x: mx.array) -> mx.array:
        return self.dense_4h_to_h(ACTIVATIONS[self.activation](self.dense_h_to_4h(x)))


class Block(nn.Module):
    """Both on the same input (Falcon 7B, 40B), or one after the other (RW)."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.parallel = args.parallel_attn or args.new_decoder_architecture
        self.self_attention = Attention(args)
        self.mlp = MLP(args)
        names = ["input_layernorm"]
        if args.norms_apart:
            names = ["ln_attn", "ln_mlp"]
        elif not args.parallel_attn:
            names = ["post_attention_layernorm", "input_layernorm"]
        for name in names:
            self[name] = nn.LayerNorm(args.hidden_size, eps=args.layer_norm_epsilon)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        norms: Any = self
        normed = norms.ln_attn(x) if "ln_attn" in self else norms.input_layernorm(x)
        attended = self.self_attention(normed, mask, cache)
        if self.parallel:
            return x + attended + self.mlp(norms.ln_mlp(x) if "ln_mlp" in self else normed)
        x = x + attended
        return x + self.mlp(norms.post_attention_layernorm(x))


class FalconModel(nn.Module):
    """The blocks between the embedding and the last norm."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.word_embeddings = nn.Embedding(args.vocab_size, args.hidden_size)
        self.h = [Block(args) for _ in range(args.num_hidden_layers)]
        self.ln_f = nn.LayerNorm(args.hidden_size, eps=args.layer_norm_epsilon)

    def __call__(self, inputs: mx.array, cache: Any = None, input_embeddings: mx.array | None = None) -> mx.array:
        x = self.word_embeddings(inputs) if input_embeddings is None else input_embeddings
        cache = [None] * len(self.h) if cache is None else cache
        mask: Any = create_attention_mask(x, cache[0], return_array=self.args.alibi)
        if self.args.alibi:
            mask = self._lean(mask, x.dtype)
        for block, entry in zip(self.h, cache, strict=True):
            x = block(x, mask, entry)
        return self.ln_f(x)

    def _lean(self, mask: mx.array, dtype: mx.Dtype) -> mx.array:
        """ALiBi on a boolean mask (..., T, S); torch rounds it to bfloat16, whatever it computes in."""
        heads = self.args.num_attention_heads
        slopes = alibi_slopes(heads).astype(mx.bfloat16)
        leaning = slopes[:, None, None] * mx.arange(mask.shape[-1]).astype(mx.bfloat16)
        leaning = leaning.astype(dtype) / math.sqrt(self.args.hidden_size // heads)
        return mx.where(mask, leaning, mx.array(mx.finfo(dtype).min, dtype))


def alibi_slopes(heads: int) -> mx.array:
    """One slope a head (heads,), fp32: transformers 5.23 ``build_alibi_tensor``."""
    whole = 2 ** math.floor(math.log2(heads))
    first = [2.0 ** (-8 * i / whole) for i in range(1, whole + 1)]
    rest = [2.0 ** (-4 * i / whole) for i in range(1, 2 * min(whole, heads - whole) + 1, 2)]
    return mx.array([*first, *rest])


class Model(WithHead):
    """Falcon with its head."""

    decoder_name, embedding, blocks = "transformer", "word_embeddings", "h"

    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args, FalconModel(args))


def classes() -> tuple[type[Any], type]:
    """What builds it."""
    return Model, ModelArgs
