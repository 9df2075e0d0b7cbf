"""The causal convolution of each channel for itself, as sums of shifted tokens.

The general one has a kernel and a plan for its gradient on a GPU, and none of its own on a CPU, where it takes three
times as long.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx


def causal_convolution(x: mx.array, weight: mx.array) -> mx.array:
    """y_t = Σ_j w_j x_{t-k+1+j}, tokens before the first being zeros. Computed in float32.

    Args:
        x: (B, T, C).
        weight: (C, k, 1), as ``nn.Conv1d`` with a group for each channel holds it.

    Returns:
        (B, T, C), of x's dtype.
    """
    convolved: Any = _convolve(x.astype(mx.float32), weight.astype(mx.float32))
    return convolved.astype(x.dtype)


@mx.custom_function
def _convolve(x: mx.array, weight: mx.array) -> mx.array:
    return _sum_shifted(_shifted(x, weight.shape[1], 0), weight)


@_convolve.vjp
def _convolve_vjp(primals: Any, cotangent: mx.array, _: Any) -> tuple[mx.array, mx.array]:
    x, weight = primals
    width = weight.shape[1]
    by_x = _sum_shifted(_shifted(cotangent, 0, width), weight[:, ::-1])
    by_weight = mx.stack([(cotangent * part).sum(axis=(0, 1)) for part in _shifted(x, width, 0)], axis=-1)
    return by_x, by_weight[..., None]


def _shifted(x: mx.array, before: int, after: int) -> list[mx.array]:
    """The windows of as many tokens as there are, with zeros ``before`` and ``after`` them (less one)."""
    width, tokens = before + after, x.shape[1]
    padded = mx.pad(x, [(0, 0), (max(before - 1, 0), max(after - 1, 0)), (0, 0)])
    return [padded[:, j : j + tokens] for j in range(width)]


def _sum_shifted(parts: list[mx.array], weight: mx.array) -> mx.array:
    total = parts[0] * weight[:, 0, 0]
    for j, part in enumerate(parts[1:], start=1):
        total = total + part * weight[:, j, 0]
    return total
