"""Which rows a micro-batch is computed in: few shapes, little padding, and short rows where documents share them.

A compiled step is traced once for each shape, so a run should use few. Those of a dataset are chosen before training
(:mod:`hf_mlx.data.fitting`); a batch that fits none of them, and every batch of a stream, takes one of a fixed table.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from .batch import Batch
from .buckets import bucket_length
from .documents import Documents, find_documents
from .packing import fill_bins

#: Width of a row at which attention under a mask costs as much as all else. By FLOPs that is 15,000 in a Llama of 1B;
#: where scores are written to memory (Metal, CPU, fp32) and in small models it is nearer to 1,000.
BALANCE = 4096
#: mlx 0.32.4 on CUDA fuses the backward pass of attention for widths that are multiples of its tile alone
#: (``ScaledDotProductAttentionVJP::use_fallback``); at others the scores are written to memory.
TILE, UNFUSED = 128, 2
#: A batch takes a shape of the run unless one of its own costs less than half: a trace costs as much as many steps.
SLACK = 2
# Of all positions, what the fixed table gathers before the vocabulary projection; above the last it does not pay.
_GATHERED = (0.25, 0.5)
# Row counts of a batch whose rows are shared are rounded up to quarters of its rows.
_ROW_LEVELS = 4


@dataclass(frozen=True)
class Shape:
    """Rows that a step is traced for.

    Attributes:
        rows, width: (R, W) of ``input_ids``.
        shared: Whether a row may hold several documents, and so needs a mask.
        scored: Rising counts of scored positions to gather; beyond the last all positions are projected. None takes
            those of the fixed table.
    """

    rows: int
    width: int
    shared: bool
    scored: tuple[int, ...] | None = None

    @property
    def size(self) -> int:
        """Positions."""
        return self.rows * self.width

    @property
    def cost(self) -> float:
        """Work of a step, in positions of a model without attention; a plain causal mask halves that of attention."""
        attention = (1 if self.shared else 0.5) * (UNFUSED if self.width % TILE else 1)
        return self.size * (1 + attention * self.width / BALANCE)

    def gathered(self, scored: int) -> int | None:
        """How many positions are gathered when ``scored`` are; None where all are projected."""
        levels = [int(share * self.size) for share in _GATHERED] if self.scored is None else self.scored
        return next((level for level in levels if scored <= level), None)

    def fill(self, sizes: np.ndarray) -> Sequence[Sequence[int]] | None:
        """Document numbers of each row, for documents of ``sizes``; None where they do not fit."""
        if sizes.sum() > self.size or sizes.max() > self.width:
            return None
        bins = fill_bins(sizes, self.width) if self.shared else [[number] for number in range(len(sizes))]
        return bins if len(bins) <= self.rows else None


@dataclass(frozen=True, eq=False)
class Placed:
    """Documents and where they go.

    Attributes:
        documents: Those of a batch.
        shape: The rows they go into.
        bins: Document numbers of each row, from left to right; at most ``shape.rows`` of them.
    """

    documents: Documents
    shape: Shape
    bins: Sequence[Sequence[int]]


class Shapes:
    """The shapes of a run.

    Args:
        chosen: Those for the dataset at hand; none for a stream.
        share: Documents may share a row (:func:`hf_mlx.models.architectures.can_pack`). If not, each has its own, and
            packed rows stay as they are.
        limit: Positions that the model has, where it looks them up; no row is padded to more.
    """

    def __init__(self, chosen: Iterable[Shape] = (), *, share: bool = False, limit: int | None = None) -> None:
        self.chosen = tuple(sorted(chosen, key=lambda shape: shape.cost))
        self.share = share
        self.limit = limit

    def place(self, batch: Batch) -> Placed | None:
        """Where the documents of ``batch`` go; None where its rows stay as they are."""
        documents = find_documents(batch)
        sizes = documents.sizes
        if not len(sizes) or (batch.segments is not None and not self.share):
            return None
        for shape in self.chosen:
            bins = shape.fill(sizes)
            if bins is None:
                continue
            if shape.cost > SLACK * _least_cost(sizes) and shape.cost > SLACK * self._own(batch, sizes).cost:
                break
            return Placed(documents, shape, bins)
        shape = self._own(batch, sizes)
        bins = shape.fill(sizes)
        assert bins is not None
        return Placed(documents, shape, bins)

    def _own(self, batch: Batch, sizes: np.ndarray) -> Shape:
        """The best that the fixed table has for one batch."""
        rows, longest = len(batch.lengths), int(sizes.max())
        if not self.share:
            return Shape(rows, bucket_length(longest, self.limit), False)
        if batch.segments is not None:
            options = [_share_rows(sizes, width) for width in packed_widths(longest, int(sizes.sum()))]
        else:
            step = -(-rows // _ROW_LEVELS)
            widths = padded_widths(longest)
            options = [Shape(rows, width, False) for width in widths]
            options += [Shape(-(-len(fill_bins(sizes, width)) // step) * step, width, True) for width in widths]
        return min(options, key=lambda shape: shape.cost)


def padded_widths(longest: int) -> set[int]:
    """Widths for padded rows that may be shared: the bucket of the longest, and the next multiple of the tile."""
    return {bucket_length(longest), -(-longest // TILE) * TILE}


def packed_widths(longest: int, total: int) -> set[int]:
    """Widths for packed documents: two an octave, from the longest document to all in one row."""
    octaves = range(5, total.bit_length() + 1)
    steps = (width for power in octaves for width in (1 << power, 3 << (power - 1)))
    return padded_widths(longest) | {width for width in steps if longest <= width <= total} | {bucket_length(total)}


def _least_cost(sizes: np.ndarray) -> float:
    return float(sizes.sum()) * (1 + float(sizes.max()) / (2 * BALANCE))


def _share_rows(sizes: np.ndarray, width: int) -> Shape:
    needed = len(fill_bins(sizes, width))
    if needed == len(sizes):
        return Shape(needed, width, False)
    # Row counts of three significant bits: 1, 2, … 8, 10, 12, 14, 16, 20, …
    step = 1 << max(needed.bit_length() - 3, 0)
    return Shape(-(-needed // step) * step, width, True)
