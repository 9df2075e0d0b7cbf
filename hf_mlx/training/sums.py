"""Sums of what is done to many terms, which read their input once on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from ..device import on_cpu
from ..models.sums import blocked_sum

#: Pieces of an axis that one kernel adds up, at most; the compiler takes up to 24 arrays into one (mlx 0.32.4).
PIECES = 16
#: Numbers that a piece has at least: with fewer there are not enough threads to keep a GPU's memory busy.
LEAST = 1 << 21
#: Terms of a piece are a multiple of it, so that kernels read whole vectors.
ALIGNMENT = 64


def sum_of(function: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
    """The sum of ``function(x)`` over the last axis, without a float32 array of the size of ``x`` on a GPU.

    MLX fuses what is done to single elements, but no sum with it. Pieces of the axis, side by side, are such elements:
    what is left to a reduction is a sixteenth, and ``x`` is read in its own dtype.

    Args:
        function: Of single elements, to float32; called for each piece, so it holds nothing of the length of the axis.
        x: (..., N), any dtype.

    Returns:
        (...) float32.
    """
    return blocked_sum(function(x)) if on_cpu() else sum_in_pieces(function, x)


def sum_in_pieces(function: Callable[[mx.array], mx.array], x: mx.array, least: int = LEAST) -> mx.array:
    """:func:`sum_of` as a GPU computes it, in pieces of ``least`` numbers and more."""
    count = PIECES
    while count > 1 and x.size < count * least:
        count //= 2
    length = x.shape[-1] // (count * ALIGNMENT) * ALIGNMENT
    if count == 1 or not length:
        return function(x).sum(axis=-1)
    *pieces, rest = mx.split(x, [length * end for end in range(1, count + 1)], axis=-1)
    terms = [function(piece) for piece in pieces]
    while len(terms) > 1:
        terms = [a + b for a, b in zip(terms[::2], terms[1::2], strict=True)]
    total = terms[0].sum(axis=-1)
    return total + function(rest).sum(axis=-1) if rest.shape[-1] else total
