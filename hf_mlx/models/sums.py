"""Sums of many terms that stay accurate on every backend."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..device import on_cpu

#: Terms that the CPU adds one after the other: so few round as torch's sums do, and more take longer.
BLOCK = 16


def blocked_sum(x: mx.array) -> mx.array:
    """Sum over the last axis; on the CPU block by block.

    MLX's CPU backend adds one term after the other: over a vocabulary of 49,152 that makes logsumexp 1e-4 too
    small (measured, mlx 0.32.4). Blocks bring the error down to rounding, as the tree reductions of GPUs do.

    Args:
        x: (..., N) float32.

    Returns:
        (...) float32.
    """
    if not on_cpu():
        return x.sum(axis=-1)
    blocks: Any = mx.custom_function(lambda x: _add_blocks(x, x.ndim - 1))
    # Every term has the same; without saying so, the parts of an array would be written and joined.
    blocks.vjp(lambda x, cotangent, _: mx.broadcast_to(cotangent[..., None], x.shape))
    return blocks(x)


def sum_rows(x: mx.array) -> mx.array:
    """Sum over all axes but the last, added up in float32; not differentiable on purpose: it is a gradient's.

    In float32 on the CPU block by block, as :func:`blocked_sum`. MLX's CUDA kernels add half precision up in half
    precision (mlx 0.32.4, ``col_reduce_looped``), its products do not; on the CPU sums do not either.

    Args:
        x: (..., N), any float dtype.

    Returns:
        (N,), in the dtype of ``x``.
    """
    rows = x.reshape(-1, x.shape[-1])
    if x.dtype == mx.float32:
        return _add_blocks(rows, 0) if on_cpu() else rows.sum(axis=0)
    return rows.sum(axis=0) if on_cpu() else (mx.ones((1, rows.shape[0]), x.dtype) @ rows)[0]


def add_bias(x: mx.array, bias: mx.array) -> mx.array:
    """``x + bias``, whose gradient by ``bias`` is :func:`sum_rows`.

    Args:
        x: (..., N).
        bias: (N,), in the dtype of ``x``.
    """
    add: Any = mx.custom_function(lambda x, bias: x + bias)
    add.vjp(lambda _, by_out, __: (by_out, sum_rows(by_out)))
    return add(x, bias)


def _add_blocks(x: mx.array, axis: int) -> mx.array:
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    while (count := x.shape[axis]) > BLOCK:
        # What is left over is added by itself: to pad it would copy all of ``x``.
        whole, rest = mx.split(x, [count // BLOCK * BLOCK], axis=axis)
        x = whole.reshape(*before, -1, BLOCK, *after).sum(axis=axis + 1)
        if rest.shape[axis]:
            x = mx.concatenate([x, rest.sum(axis=axis, keepdims=True)], axis=axis)
    return x.sum(axis=axis)
