"""Attention within a window: blocks of queries, with the keys that their windows reach, as rows of one batch.

A block sees a window and itself, however long the row is. Done one after the other such blocks are too small to keep a
GPU busy, so as many go together as have no more scores than one block with all keys of the row.

Source: Beltagy, Peters, Cohan, "Longformer: The Long-Document Transformer" (2020), section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np

from ..models.architectures import can_pack
from ..models.heads import layers
from ..models.load import LoadedModel
from ..models.masks import Causal


@dataclass(frozen=True)
class Part:
    """Queries that are computed together, and the keys that they may see.

    Attributes:
        start, stop: Of the queries.
        begin, end: Of the keys.
        blocks: Into how many blocks the queries fall that see keys of their own, each as many.
        width: How many that is; the first of them may be missing, before the row. 0 where all see all.
    """

    start: int
    stop: int
    begin: int
    end: int
    blocks: int = 1
    width: int = 0

    def take(self, primals: Sequence[mx.array]) -> list[mx.array]:
        """Queries, keys and values (B, heads, T, D) of this part; what follows as it is."""
        queries, keys, values, *sinks = primals
        return [self.of_queries(queries), self.of_keys(keys), self.of_keys(values), *sinks]

    def of_queries(self, x: mx.array) -> mx.array:
        """Of (…, T, D) what belongs to the queries."""
        return x[..., self.start : self.stop, :]

    def of_keys(self, x: mx.array) -> mx.array:
        """Of (…, T, D) what belongs to the keys."""
        return x[..., self.begin : self.end, :]


def is_reached(loaded: LoadedModel) -> bool:
    """Whether the attention of every layer was replaced by one that looks into a :class:`~hf_mlx.models.masks.Causal`.

    Asked once :func:`~hf_mlx.training.blocked_attention.attend_in_blocks` was called.
    """
    replaced = (any(getattr(part, "in_blocks", False) for part in layer.modules()) for layer in layers(loaded.model))
    return can_pack(loaded.model_type) and all(replaced)


def divide_window(length: int, window: int, block: int, together: int) -> list[Part]:
    """The parts of a row under a causal window, from the first query to the last.

    Args:
        length: Tokens of the row.
        window: Tokens that a query sees, itself included.
        block: Queries of a block.
        together: Queries with all keys of the row, which have as many scores as one part may.
    """
    if length <= together:
        return [Part(0, length, 0, length)]
    before = -(-(window - 1) // block) * block
    width = before + block
    whole = length // block * block
    if whole * width <= together * length:
        parts = [Part(0, whole, 0, whole, whole // block, width)]
    else:
        # Keys that do not all exist cost more here than blocks of their own.
        parts = [Part(start, start + block, 0, start + block) for start in range(0, min(before, whole), block)]
        most = max(together * length // (width * block), 1)
        for start in range(before, whole, most * block):
            count = min(most, (whole - start) // block)
            stop = start + count * block
            parts.append(Part(start, stop, start - before, stop, count, width))
    if whole < length:
        parts.append(Part(whole, length, max(whole - before, 0), length))
    return parts


def attend_in_windows(
    attend: Callable[..., mx.array],
    part: Part,
    mask: Causal,
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    *sinks: mx.array,
) -> mx.array:
    """Attention of the blocks of ``part``, each as a row of its own.

    Args:
        attend: Takes queries, keys, values, mask and ``sinks``.
        part: Of blocks with a width.
        mask: Of the whole row, with a window.
        queries: (B, heads, Q, D).
        keys: (B, key heads, K, D).
        values: (B, key heads, K, Dv).
        sinks: As ``attend`` takes them.

    Returns:
        (B, heads, Q, Dv).
    """
    batch, heads, length, _ = queries.shape
    block, width = length // part.blocks, part.width
    missing = width - block - (part.start - part.begin)
    # The same for each of them.
    seen = Causal(mask.window).between(range(width - block, width), range(width))
    if mask.segments is not None:
        ids = mx.broadcast_to(mask.segments, (batch, mask.segments.shape[1]))[:, None, :, None]
        own, theirs = _blocks(part.of_queries(ids), block), _windows(part.of_keys(ids), block, width, missing)
        seen = (own == theirs.swapaxes(-1, -2)) & seen
    if missing:
        seen = _existing(batch, part.blocks, block, width, missing) & seen
    windows = [_windows(x, block, width, missing) for x in (keys, values)]
    out = attend(_blocks(queries, block), *windows, seen, *sinks)
    return out.reshape(batch, part.blocks, heads, block, -1).swapaxes(1, 2).reshape(batch, heads, length, -1)


def _blocks(x: mx.array, block: int) -> mx.array:
    """(B, heads, n * block, D) to (B * n, heads, block, D)."""
    batch, heads, _, size = x.shape
    return x.reshape(batch, heads, -1, block, size).swapaxes(1, 2).reshape(-1, heads, block, size)


@lru_cache(maxsize=64)
def _existing(batch: int, blocks: int, block: int, width: int, missing: int) -> mx.array:
    """(B * n, 1, 1, width) bool: which keys of each block are not before the row; the same array for all layers."""
    behind: Any = np.arange(blocks)[:, None] * block + np.arange(width) >= missing
    return mx.array(np.tile(behind, (batch, 1))[:, None, None])


def _windows(x: mx.array, block: int, width: int, missing: int) -> mx.array:
    """(B, heads, K, D) to (B * n, heads, width, D): ``width`` keys for each block, a block on from the last.

    Args:
        missing: Keys before the first that the first blocks would see; they are 0.
    """
    if missing:
        x = mx.pad(x, [(0, 0), (0, 0), (missing, 0), (0, 0)])
    batch, heads, length, size = x.shape
    apart = x.reshape(batch, heads, -1, block, size)
    count = (length - width) // block + 1
    found: Any = mx.concatenate([apart[:, :, at : at + count] for at in range(width // block)], axis=3)
    return found.swapaxes(1, 2).reshape(-1, heads, width, size)
