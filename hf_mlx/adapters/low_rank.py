"""A frozen layer plus a low-rank product, with as few passes over the large arrays as matrix products allow.

The sum is the accumulator of the second product, forwards (over the layer's output) and backwards (over its input's
gradient), and the scale is applied to the rank-sized array in between. Written out as separate operations the same
numbers take two more arrays of the output's size forwards and three backwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx


def scaled(x: mx.array, scale: float) -> mx.array:
    """``scale * x`` in float32, rounded once to the dtype of ``x``.

    torch multiplies a bf16 tensor by a Python float in fp32; mlx would round the float to bf16 first.
    """
    return x if scale == 1.0 else (x.astype(mx.float32) * scale).astype(x.dtype)


def add_low_rank(
    layer: Callable[[mx.array], mx.array], x: mx.array, a: mx.array, b: mx.array, scale: float
) -> mx.array:
    """``layer(x) + scale * (x @ a.T) @ b.T``.

    Args:
        layer: Frozen; its output has the dtype of ``x``.
        x: (..., in).
        a: (r, in), in the dtype of ``x``.
        b: (out, r), in the dtype of ``x``.
        scale: Factor of the product.

    Returns:
        (..., out), differentiable in ``x``, ``a`` and ``b``.
    """

    def forward(x: mx.array, a: mx.array, b: mx.array) -> tuple[mx.array, mx.array]:
        inner = scaled(x @ a.T, scale)
        return mx.addmm(layer(x), inner, b.T), inner

    def backward(primals, cotangents, outputs):
        x, a, b = primals
        by_out, inner = cotangents[0], outputs[1]
        by_inner = scaled(by_out @ b, scale)
        _, (by_x,) = mx.vjp(layer, [x], [by_out])
        return mx.addmm(by_x, by_inner, a), _rows(by_inner).T @ _rows(x), _rows(by_out).T @ _rows(inner)

    added: Any = mx.custom_function(forward)
    added.vjp(backward)
    return added(x, a, b)[0]


def _rows(x: mx.array) -> mx.array:
    return x.reshape(-1, x.shape[-1])
