"""Rows of a matrix by their numbers, as fast as MLX's kernels allow."""

from __future__ import annotations

import mlx.core as mx


def take_rows(x: mx.array, index: mx.array) -> mx.array:
    """``x[index]`` of x (N, D), in words of eight bytes: MLX's CUDA gather works number by number (mlx 0.32.4).

    It has no gradient of its own.

    Args:
        x: (N, D), any dtype.
        index: Integers below N, any shape.

    Returns:
        (*index.shape, D).
    """
    if x.shape[-1] * x.itemsize % mx.uint64.size:
        return x[index]
    return x.view(mx.uint64)[index].view(x.dtype)
