"""A micro-batch laid into the rows it is computed in.

A document attends to itself alone, and rotary embeddings see distances, not places. So the rows that a collator made
need not be those that are computed: wherever the documents lie, each token gets the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .batch import IGNORE, Batch
from .shapes import Placed


@dataclass(frozen=True, eq=False)
class Rows:
    """A micro-batch as it is computed.

    Attributes:
        input_ids: (R, W) int32.
        targets: (R, W) int32, the next token of each position or -100.
        segments: (R, W) int32 document number of each token; None where no row holds two documents.
        lengths: (R,) int32, positions that upstream's attention mask lets through; they come first in each row.
    """

    input_ids: np.ndarray
    targets: np.ndarray
    segments: np.ndarray | None
    lengths: np.ndarray


def shift_labels(labels: np.ndarray) -> np.ndarray:
    """Targets (B, T) of labels (B, T); the last position of a row scores nothing.

    A label below 0 that is not -100 counts as the token 0 (trl 1.16 ``add_fused_lm_head`` off Triton, and transformers
    5.23 ``LabelSmoother``: ``labels.clamp(min=0)`` under a mask of ``labels != -100``).
    """
    targets = np.full(labels.shape, IGNORE, np.int32)
    targets[:, :-1] = np.where((labels < 0) & (labels != IGNORE), 0, labels)[:, 1:]
    return targets


def lay_out(batch: Batch, placed: Placed, pad_token_id: int) -> Rows:
    """The documents of ``batch`` where ``placed`` says; what is left over is filled with ``pad_token_id`` and -100."""
    shape, bins = placed.shape, placed.bins
    order = np.fromiter((document for bin in bins for document in bin), np.int64)
    per_row = np.fromiter(map(len, bins), np.int64, len(bins))
    sizes, starts = placed.documents.sizes[order], placed.documents.starts[order]
    # Tokens are numbered through: `offsets` is the first one of each document, `filled` the first one of each row.
    offsets = np.cumsum(sizes) - sizes
    filled = np.append(offsets, sizes.sum())[np.append(0, np.cumsum(per_row))]
    row_starts = np.arange(len(bins)) * shape.width
    token = np.arange(int(sizes.sum()))
    source = token + np.repeat(starts - offsets, sizes)
    place = token + np.repeat(np.repeat(row_starts - filled[:-1], per_row), sizes)

    def move(values: np.ndarray, fill: int) -> np.ndarray:
        out = np.full(shape.size, fill, np.int32)
        out[place] = values
        return out.reshape(shape.rows, shape.width)

    # Padding is a document of its own, so that no row of the mask is empty.
    segments = move(np.repeat(np.arange(len(order)), sizes), len(order)) if shape.shared else None
    lengths = np.zeros(shape.rows, np.int32)
    lengths[: len(bins)] = np.diff(filled)
    return Rows(
        move(batch.input_ids.reshape(-1)[source], pad_token_id),
        move(shift_labels(batch.labels).reshape(-1)[source], IGNORE),
        segments,
        lengths,
    )
