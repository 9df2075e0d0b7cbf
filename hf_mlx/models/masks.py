"""Packed rows: the mask of separate examples, handed in through mlx-lm's ``cache`` argument.

mlx-lm asks its cache for the mask and for the keys and values. A cache that answers with a
block-diagonal mask and passes keys and values through is therefore the whole of packing; no
model code changes.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx


class SegmentCache:
    """A cache that holds nothing: positions start at 0, attention stays within a segment.

    Args:
        segments: Integer ids, shape (B, T); tokens attend to earlier tokens with the same id in their row.
    """

    offset = 0

    def __init__(self, segments: mx.array) -> None:
        self.segments = segments

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """The boolean mask (B, 1, T, T): causal, within a segment, and within ``window_size`` tokens if given."""
        same = self.segments[:, :, None] == self.segments[:, None, :]
        return (same & _before(N, window_size))[:, None]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Keys and values as they are."""
        return keys, values

    @property
    def state(self) -> list:
        """Nothing to keep."""
        return []


class KeyCache(SegmentCache):
    """A cache that holds nothing and hides keys, as an attention mask of transformers does.

    A query that sees no key gets an attention output of zero in torch's ``scaled_dot_product_attention``. Softmax over
    nothing is undefined, so one key and one value of zeros stand in front, which those queries alone see.

    Args:
        keys: (B, T) bool, False where no position may look.
    """

    def __init__(self, keys: mx.array) -> None:
        self.keys = keys

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """The boolean mask (B, 1, T, 1 + T): causal, of visible keys, and within ``window_size`` tokens if given."""
        seen = self.keys[:, None, :] & _before(N, window_size)
        blind = mx.logical_not(seen.any(axis=-1, keepdims=True))
        return mx.concatenate([blind, seen], axis=-1)[:, None]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Keys and values (B, heads, T, size), with zeros in front."""
        return tuple(mx.pad(x, [(0, 0), (0, 0), (1, 0), (0, 0)]) for x in (keys, values))  # pyright: ignore


def _before(tokens: int, window: int | None) -> mx.array:
    """(T, T) bool: each position and those before it, within ``window`` of them if given."""
    positions = mx.arange(tokens)
    behind = positions[:, None] - positions[None, :]
    mask = behind >= 0
    return mask if window is None else mask & (behind < window)


def masked_cache(model: Any, keys: mx.array) -> list[KeyCache]:
    """A cache for ``model(input_ids, cache=…)`` that hides the keys (B, T) where they are False.

    Args:
        model: A model whose type :func:`hf_mlx.models.architectures.can_pack` accepts.
        keys: May be traced by ``mx.compile``.
    """
    return [KeyCache(keys)] * len(model.layers)


def packed_cache(model: Any, segments: mx.array) -> list[SegmentCache]:
    """A cache for ``model(input_ids, cache=…)`` that keeps packed examples apart.

    Args:
        model: A model whose type :func:`hf_mlx.models.architectures.can_pack` accepts.
        segments: Segment ids (B, T), one for each token; may be traced by ``mx.compile``. Padding gets an
            id of its own, so that no row of the mask is empty.

    Returns:
        One entry for each layer, all of them the same object.

    Example:
        >>> logits = model(input_ids, cache=packed_cache(model, segments))
    """
    return [SegmentCache(segments)] * len(model.layers)
