"""Matrices that are lower triangular, from their blocks: in products only, which every device has."""

from __future__ import annotations

from functools import cache

import mlx.core as mx
import numpy as np

# Below this size whole blocks are multiplied at once; above it, products of quarters cost less.
_SMALL = 8


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
    size = strict.shape[-1]
    if size <= _SMALL:
        return _by_levels(strict)
    half = size // 2
    both = unit_lower_inverse(mx.stack([strict[..., :half, :half], strict[..., half:, half:]]))
    first, last = both[:1].squeeze(0), both[1:].squeeze(0)
    return join_blocks(first, -(last @ (strict[..., half:, :half] @ first)), last)


def _by_levels(strict: mx.array) -> mx.array:
    """[[A, 0], [B, D]]⁻¹ = [[A⁻¹, 0], [-D⁻¹BA⁻¹, D⁻¹]] for all diagonal blocks of a size, sizes 1, 2, 4, …"""
    size = strict.shape[-1]
    inverse = identity(size) - strict * _between(size, 1)
    step = 2
    while step < size:
        inverse = inverse - inverse @ (strict * _between(size, step) @ inverse)
        step *= 2
    return inverse


# Constants: what computes them would be a kernel more to compile. Data, not operations, which a trace would keep.
@cache
def identity(size: int) -> mx.array:
    """1 on the diagonal, else 0: (size, size)."""
    return mx.array(np.eye(size, dtype=np.float32))


@cache
def lower(size: int, diagonal: int = 0) -> mx.array:
    """1 up to the diagonal, or up to one ``diagonal`` beside it, else 0: (size, size)."""
    return mx.array(np.tri(size, k=diagonal, dtype=np.float32))


@cache
def _between(size: int, step: int) -> mx.array:
    """1 where a lower block of ``step`` rows meets the upper one that makes it a block of twice the size, else 0."""
    rows = np.arange(size)
    pair, odd = rows // (2 * step), rows // step % 2
    return mx.array(((pair[:, None] == pair[None]) & (odd[:, None] > odd[None])).astype(np.float32))
