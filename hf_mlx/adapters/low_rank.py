"""A frozen layer plus a low-rank product, with as few passes over the large arrays as matrix products allow.

The sum is the accumulator of the second product, forwards (over the layer's output) and backwards (over its input's
gradient), and the scale is applied there, in fp32. Written out as separate operations the same numbers take two more
arrays of the output's size forwards and three backwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from ..models.frozen_products import FrozenLinear
from ..models.products import addmm, in_rows, in_shape_of, matmul, scaled_matmul


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
        (..., out), differentiable in ``x``, ``a`` and ``b``; the gradient of ``x`` is there once the others are, see
        :mod:`hf_mlx.training.backward_order`.
    """

    # In rows: MLX would flatten each product of more axes by itself, and multiply a batch of them where one adds.
    rows = in_rows(x)
    # An input of the function, so that the backward pass reads no output of it: one that is recomputed
    # under a checkpoint then leaves the large product out.
    inner = mx.stop_gradient(matmul(rows, a.T))

    def forward(x: mx.array, a: mx.array, b: mx.array, inner: mx.array) -> mx.array:
        return addmm(layer(x), inner, b.T, scale)

    def backward(primals, by_out, _):
        x, a, b, inner = primals
        by_inner = matmul(by_out, b)
        by_x = addmm(_multiply_back(layer, x, by_out), by_inner, a, scale)
        by_a, by_b = scaled_matmul(by_inner.T, x, scale), scaled_matmul(by_out.T, inner, scale)
        return mx.depends([by_x], [by_a, by_b])[0], by_a, by_b, mx.zeros_like(inner)

    added: Any = mx.custom_function(forward)
    added.vjp(backward)
    return in_shape_of(x, added(rows, a, b, inner))


def _multiply_back(layer: Any, x: mx.array, by_out: mx.array) -> mx.array:
    """The gradient of ``x`` in ``layer(x)``."""
    if isinstance(layer, FrozenLinear):
        return layer.multiply_back(by_out)
    return mx.vjp(layer, [x], [by_out])[1][0]
