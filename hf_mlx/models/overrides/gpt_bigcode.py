"""GPTBigCode with a key and a value for each head: its projection is laid out by head.

Source: transformers 5.23 ``GPTBigCodeAttention``; mlx-lm 0.32 reads all queries first, then keys, then values.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models import gpt_bigcode
from mlx_lm.models.base import scaled_dot_product_attention


class ByHead(gpt_bigcode.Attention):
    """mlx-lm's, with query, key and value of a head side by side."""

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        batch, length, _ = x.shape
        q, k, v = self.c_attn(x).reshape(batch, length, self.n_heads, -1).swapaxes(1, 2).split(3, axis=-1)
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        out = scaled_dot_product_attention(q, k, v, cache=cache, scale=self.scale, mask=mask)
        return self.c_proj(out.swapaxes(1, 2).reshape(batch, length, -1))


def read_by_head(model: Any, config: dict[str, Any]) -> None:
    """Gives the blocks of a model without ``multi_query`` that attention."""
    if not config.get("multi_query", True):
        for block in model.layers:
            block.attn.__class__ = ByHead
