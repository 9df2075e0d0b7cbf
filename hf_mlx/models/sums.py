"""Sums of many float32 terms that stay accurate on every backend."""

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
    blocks: Any = mx.custom_function(_add_blocks)
    # Every term has the same; without saying so, the parts of an array would be written and joined.
    blocks.vjp(lambda x, cotangent, _: mx.broadcast_to(cotangent[..., None], x.shape))
    return blocks(x)


def _add_blocks(x: mx.array) -> mx.array:
    while x.shape[-1] > BLOCK:
        # What is left over is added by itself: to pad it would copy all of ``x``.
        whole, rest = mx.split(x, [x.shape[-1] // BLOCK * BLOCK], axis=-1)
        sums = whole.reshape(*x.shape[:-1], -1, BLOCK).sum(axis=-1)
        x = mx.concatenate([sums, rest.sum(axis=-1, keepdims=True)], axis=-1) if rest.shape[-1] else sums
    return x.sum(axis=-1)


def add_rows(x: mx.array) -> mx.array:
    """Sum over all axes but the last, block by block; not differentiable on purpose: it is a gradient's.

    Args:
        x: (..., N) float32.

    Returns:
        (N,) float32.
    """
    x = x.reshape(-1, x.shape[-1])
    while len(x) > BLOCK:
        whole, rest = mx.split(x, [len(x) // BLOCK * BLOCK])
        sums = whole.reshape(-1, BLOCK, x.shape[-1]).sum(axis=1)
        x = mx.concatenate([sums, rest.sum(axis=0, keepdims=True)]) if len(rest) else sums
    return x.sum(axis=0)
