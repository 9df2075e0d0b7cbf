"""Attention for the backward pass on MLX's CPU backend, with few passes over the scores and an exponential of its own.

The exponentials are not divided by their sum: outputs and their gradients are, which are as wide as a head and not as
a row of scores. Queries that share keys are rows of one product.

Source: Dao et al., "FlashAttention" (2022), whose backward pass takes the sum over a row of scores from the output.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..device import on_cpu
from ..models.sums import blocked_sum
from .exponential import exponential

# The score of a key that a query does not see, as in MLX.
_HIDDEN = mx.finfo(mx.float32).min


def attention(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: mx.array | str | None
) -> mx.array:
    """``mx.fast.scaled_dot_product_attention`` without sinks; on the CPU and in float32 up to the order of sums.

    Args:
        queries: (B, heads, T, D).
        keys: (B, key heads, S, D).
        values: (B, key heads, S, Dv).
        scale: Of the scores.
        mask: ``"causal"``, None, or (…, T, S) bool.

    Returns:
        (B, heads, T, Dv).
    """
    if not (on_cpu() and queries.dtype == keys.dtype == values.dtype == mx.float32):
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)
    batch, heads, length, _ = queries.shape
    key_heads, seen = keys.shape[1:3]
    together = (batch, key_heads, heads // key_heads * length, -1)
    apart = (batch, key_heads, heads // key_heads, length, -1)
    sees_itself = mask is None or isinstance(mask, str)
    if isinstance(mask, str):
        mask = mx.arange(seen - length, seen)[:, None] >= mx.arange(seen)
    elif mask is not None and mask.ndim > 2:
        mask = mask[(None,) * (4 - mask.ndim)]
        mask = mask.reshape(len(mask), key_heads, -1, *mask.shape[2:]) if mask.shape[1] == heads else mask[:, None]

    def forward(queries: mx.array, keys: mx.array, values: mx.array) -> tuple[mx.array, ...]:
        scores = queries @ keys.swapaxes(-1, -2)
        if mask is not None:
            scores = mx.where(mask, scores.reshape(apart), _HIDDEN).reshape(scores.shape)
        top = scores.max(axis=-1, keepdims=True)
        exponentials = exponential(scores - top)
        total = blocked_sum(exponentials)[..., None]
        return exponentials @ values / total, exponentials, total, top

    def backward(primals: Any, cotangents: Any, results: Any) -> tuple[mx.array, ...]:
        (queries, keys, values), (output, exponentials, total, top) = primals, results
        by_output = cotangents[0] / total
        by_values = exponentials.swapaxes(-1, -2) @ by_output
        if not sees_itself:
            # A query that sees nothing has the mean of all values, whatever it is.
            by_output = mx.where(top > _HIDDEN, by_output, 0.0)
        mean = (by_output * output).sum(axis=-1, keepdims=True)
        by_scores = exponentials * (by_output @ values.swapaxes(-1, -2) - mean)
        return by_scores @ keys, by_scores.swapaxes(-1, -2) @ queries, by_values

    attend: Any = mx.custom_function(forward)
    attend.vjp(backward)
    output, *_ = attend((queries * scale).reshape(together), keys, values)
    return output.reshape(batch, heads, length, -1)
