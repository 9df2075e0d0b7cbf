"""Matrices that are lower triangular, from their blocks: in products only, which every device has."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

# Below this size whole blocks are multiplied at once; above it, products of quarters cost less.
_SMALL = 16


def join_blocks(upper: mx.array, below: mx.array, lower: mx.array) -> mx.array:
    """``[[upper, 0], [below, lower]]`` of blocks with shape (…, h, h)."""
    top = mx.concatenate([upper, mx.zeros_like(upper)], axis=-1)
    return mx.concatenate([top, mx.concatenate([below, lower], axis=-1)], axis=-2)


def unit_lower_inverse(strict: mx.array) -> mx.array:
    """The inverse of I + L.

    By blocks rather than by powers of L: those grow beyond float32 where many keys of a chunk are alike.

    Args:
        strict: L, shape (…, n, n), zero on and above the diagonal; n a power of two.

    Returns:
        Shape (…, n, n), unit lower triangular.
    """
    inverse: Any = _inverse(strict)
    return inverse


@mx.custom_function
def _inverse(strict: mx.array) -> mx.array:
    return _by_blocks(strict)


@_inverse.vjp
def _inverse_vjp(strict: mx.array, cotangent: mx.array, inverse: mx.array) -> mx.array:
    transposed = inverse.swapaxes(-1, -2)
    return -mx.tril(transposed @ cotangent @ transposed, -1)


def _by_blocks(strict: mx.array) -> mx.array:
    size = strict.shape[-1]
    if size <= _SMALL:
        return _by_levels(strict)
    half = size // 2
    upper, lower = _by_blocks(mx.stack([strict[..., :half, :half], strict[..., half:, half:]]))
    return join_blocks(upper, -(lower @ (strict[..., half:, :half] @ upper)), lower)


def _by_levels(strict: mx.array) -> mx.array:
    """[[A, 0], [B, D]]⁻¹ = [[A⁻¹, 0], [-D⁻¹BA⁻¹, D⁻¹]] for all diagonal blocks of a size, sizes 1, 2, 4, …"""
    size = strict.shape[-1]
    rows = mx.arange(size)
    inverse = mx.eye(size) - mx.where(_between(rows, 1), strict, 0)
    step = 2
    while step < size:
        inverse = inverse - inverse @ (mx.where(_between(rows, step), strict, 0) @ inverse)
        step *= 2
    return inverse


def _between(rows: mx.array, step: int) -> mx.array:
    """Where a lower block of ``step`` rows meets the upper one that it forms a block of twice the size with."""
    pair, odd = rows // (2 * step), rows // step % 2
    return (pair[:, None] == pair[None]) & (odd[:, None] > odd[None])
