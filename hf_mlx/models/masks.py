"""Packed rows: the mask of separate examples, handed in through mlx-lm's ``cache`` argument.

mlx-lm asks its cache for the mask and for the keys and values. A cache that answers with a
block-diagonal mask and passes keys and values through is therefore the whole of packing; no
model code changes.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np


class Causal(str):
    """mlx-lm's mask ``"causal"`` with what narrows it; no model's code looks into it.

    Attributes:
        window: Tokens that a query sees, itself and those before it; None for all.
        segments: Integer ids (B, T), of which a query sees its own; None for one document a row.
    """

    __slots__ = ("segments", "window")

    def __new__(cls, window: int | None, segments: mx.array | None = None) -> Causal:
        mask = super().__new__(cls, "causal")
        mask.window, mask.segments = window, segments
        return mask

    def between(self, queries: range, keys: range) -> mx.array:
        """Which of the positions ``keys`` each of ``queries`` sees: bool (Q, K), with segments (B, 1, Q, K)."""
        seen = _before(queries, keys, self.window)
        if self.segments is None:
            return seen
        own, theirs = (self.segments[:, part.start : part.stop] for part in (queries, keys))
        return ((own[:, :, None] == theirs[:, None]) & seen)[:, None]


class RowCache:
    """A cache that holds nothing: positions start at 0, and a row is one document.

    Args:
        written: Tokens of the longest row for which a layer's window is written out in a mask of T x T; in longer ones
            it is said in a :class:`Causal`, which the attention of all layers has to know.
    """

    offset = 0
    segments: mx.array | None = None

    def __init__(self, written: float = math.inf) -> None:
        self.written = written

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """``"causal"``; where that does not say all a :class:`Causal` or a boolean mask, (T, T) or (B, 1, T, T)."""
        narrow = bool(window_size) and window_size < N
        if narrow and self.written < N and not return_array:
            return Causal(window_size, self.segments)
        if self.segments is None and not narrow and not return_array:
            return "causal"
        return Causal(window_size if narrow else None, self.segments).between(range(N), range(N))

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Keys and values as they are."""
        return keys, values

    @property
    def state(self) -> list:
        """Nothing to keep."""
        return []


class SegmentCache(RowCache):
    """A cache that holds nothing: positions start at 0, attention stays within a segment.

    Args:
        segments: Integer ids, shape (B, T); tokens attend to earlier tokens with the same id in their row.
        written: Of :class:`RowCache`.
    """

    def __init__(self, segments: mx.array, written: float = math.inf) -> None:
        super().__init__(written)
        self.segments = segments


class KeyCache(RowCache):
    """A cache that holds nothing and hides keys, as an attention mask of transformers does.

    A query that sees no key gets an attention output of zero in torch's ``scaled_dot_product_attention``. Softmax over
    nothing is undefined, so one key and one value of zeros stand in front, which those queries alone see.

    Args:
        keys: (B, T) bool, False where no position may look.
    """

    def __init__(self, keys: mx.array) -> None:
        super().__init__()
        self.keys = keys

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """The boolean mask (B, 1, T, 1 + T): causal, of visible keys, and within ``window_size`` tokens if given."""
        seen = self.keys[:, None, :] & _before(range(N), range(N), window_size)
        blind = mx.logical_not(seen.any(axis=-1, keepdims=True))
        return mx.concatenate([blind, seen], axis=-1)[:, None]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Keys and values (B, heads, T, size), with zeros in front."""
        return tuple(mx.pad(x, [(0, 0), (0, 0), (1, 0), (0, 0)]) for x in (keys, values))  # pyright: ignore


def _before(queries: range, keys: range, window: int | None) -> mx.array:
    """(Q, K) bool: keys at a query's position and before it, within ``window`` of them if given."""
    behind = _positions(queries)[:, None] - _positions(keys)
    mask = behind >= 0
    return mask if window is None else mask & (behind < window)


@lru_cache(maxsize=1024)
def _positions(part: range) -> mx.array:
    # The same array each time: from it the compiler sees which masks of a step are one, and makes that once.
    return mx.array(np.arange(part.start, part.stop, dtype=np.int32))


def masked_cache(model: Any, keys: mx.array) -> list[KeyCache]:
    """A cache for ``model(input_ids, cache=…)`` that hides the keys (B, T) where they are False.

    Args:
        model: A model whose type :func:`hf_mlx.models.architectures.can_pack` accepts.
        keys: May be traced by ``mx.compile``.
    """
    return [KeyCache(keys)] * len(model.layers)


def packed_cache(model: Any, segments: mx.array, written: float = math.inf) -> list[SegmentCache]:
    """A cache for ``model(input_ids, cache=…)`` that keeps packed examples apart.

    Args:
        model: A model whose type :func:`hf_mlx.models.architectures.can_pack` accepts.
        segments: Segment ids (B, T), one for each token; may be traced by ``mx.compile``. Padding gets an
            id of its own, so that no row of the mask is empty.
        written: Of :class:`RowCache`.

    Returns:
        One entry for each layer, all of them the same object.

    Example:
        >>> logits = model(input_ids, cache=packed_cache(model, segments))
    """
    return [SegmentCache(segments, written)] * len(model.layers)


def row_cache(model: Any, tokens: int, written: float) -> list[RowCache] | None:
    """A cache for ``model(input_ids, cache=…)`` with one document a row; None where none is needed.

    Args:
        model: As for :func:`packed_cache`.
        tokens: Of a row.
        written: Of :class:`RowCache`.
    """
    return [RowCache(written)] * len(model.layers) if tokens > written else None
