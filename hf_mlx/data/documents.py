"""The documents of a micro-batch: runs of tokens that attend to each other, wherever they lie."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .batch import Batch


@dataclass(frozen=True, eq=False)
class Documents:
    """Where the documents of a batch are.

    Attributes:
        starts: (n,) int64, first position of each in the flattened (B, T) batch.
        sizes: (n,) int64, tokens of each, at least 1.
    """

    starts: np.ndarray
    sizes: np.ndarray


def counted_lengths(batch: Batch) -> np.ndarray:
    """Positions of each row that upstream's attention mask lets through, (B,) int32.

    A padding-free row has no mask: its padding counts.
    """
    return batch.lengths if len(batch.lengths) > 1 else np.array([batch.num_tokens], np.int32)


def find_documents(batch: Batch) -> Documents:
    """The documents of ``batch``, row by row; padding belongs to none, unless upstream counts it."""
    rows, width = batch.shape
    counted = counted_lengths(batch).astype(np.int64)
    if batch.segments is None:
        starts = np.arange(rows) * width
        ends = starts + counted
    else:
        first = np.diff(batch.segments, axis=1, prepend=-1) != 0
        starts = np.flatnonzero(first & (np.arange(width) < counted[:, None]))
        row = starts // width
        ends = np.minimum(np.append(starts[1:], rows * width), row * width + counted[row])
    filled = ends > starts
    return Documents(starts[filled], (ends - starts)[filled])
