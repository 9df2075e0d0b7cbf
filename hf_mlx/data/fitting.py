"""The shapes of a run, chosen from a sample of its micro-batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from .batch import Batch
from .buckets import bucket_length
from .documents import find_documents
from .packing import fill_bins
from .shapes import Shape, Shapes, packed_widths, padded_widths

#: Shapes chosen for a run, at most.
MOST = 12
#: A shape is added while it saves this share of the work.
GAIN = 0.005
#: Micro-batches of a sample, and tokens after which no more are read: a second's work at most.
SAMPLE, SAMPLE_TOKENS = 64, 500_000
# Gathering pays where it leaves less than this share of the positions to project; a second count, where it leaves less
# than the root of it of what the first one left.
_GATHER_BELOW = 0.75


class _Seen(NamedTuple):
    """What a micro-batch of the sample asks for."""

    rows: int
    packed: bool
    sizes: np.ndarray
    scored: int


def fit_shapes(batches: Iterable[Batch], *, share: bool, limit: int | None = None) -> Shapes:
    """The shapes that compute a sample of micro-batches with the least work.

    Greedy: the first is the one that costs least for all, and each further one that saves most, at most :data:`MOST`.

    Args:
        batches: Micro-batches as the run will see them; the first :data:`SAMPLE` are read.
        share: Documents may share a row.
        limit: Positions that the model has, where it looks them up.
    """
    sample = _read(batches, share)
    if not sample:
        return Shapes(share=share, limit=limit)
    candidates, costs = _tabulate(sample, share, limit)
    taken = _select(costs)
    used = np.array(taken)[costs[:, taken].argmin(axis=1)]
    served = {k: [seen.scored for seen, by in zip(sample, used, strict=True) if by == k] for k in taken}
    return Shapes([_gather(candidates[k], scored) for k, scored in served.items() if scored], share=share, limit=limit)


def _read(batches: Iterable[Batch], share: bool) -> list[_Seen]:
    sample, tokens = [], 0
    for batch in batches:
        packed = batch.segments is not None
        sizes = find_documents(batch).sizes
        if not len(sizes) or (packed and not share):
            continue
        sample.append(_Seen(len(batch.lengths), packed, sizes, batch.num_items))
        tokens += int(sizes.sum())
        if len(sample) == SAMPLE or tokens > SAMPLE_TOKENS:
            break
    return sample


def _widths(sample: Sequence[_Seen], share: bool, limit: int | None) -> list[int]:
    longest = {int(seen.sizes.max()) for seen in sample}
    if not share:
        return sorted({bucket_length(size, limit) for size in longest})
    if not any(seen.packed for seen in sample):
        return sorted(set().union(*map(padded_widths, longest)))
    total = max(int(seen.sizes.sum()) for seen in sample)
    return sorted(set().union(*(packed_widths(size, total) for size in longest)))


def _tabulate(sample: Sequence[_Seen], share: bool, limit: int | None) -> tuple[list[Shape], np.ndarray]:
    """Candidates, and the cost of each micro-batch (rows) in each of them (columns); infinite where it does not fit."""
    widths = _widths(sample, share, limit)
    # Rows that each micro-batch takes at each width: one a document, and shared.
    needed: list[dict[tuple[int, bool], int]] = []
    for seen in sample:
        enough = [width for width in widths if width >= seen.sizes.max()]
        alone = len(seen.sizes) if seen.packed else seen.rows
        rows = {(width, False): alone for width in enough}
        if share:
            rows |= {(width, True): len(fill_bins(seen.sizes, width)) for width in enough}
        needed.append(rows)
    found = {Shape(rows, width, shared) for each in needed for (width, shared), rows in each.items()}
    candidates = sorted(found, key=lambda shape: (shape.cost, shape.rows, shape.shared))
    costs = [
        [shape.cost if rows.get((shape.width, shape.shared), np.inf) <= shape.rows else np.inf for shape in candidates]
        for rows in needed
    ]
    return candidates, np.array(costs)


def _select(costs: np.ndarray) -> list[int]:
    unfit = 10 * costs[np.isfinite(costs)].max()
    costs = np.where(np.isfinite(costs), costs, unfit)
    taken: list[int] = []
    best = np.full(len(costs), unfit)
    while len(taken) < MOST:
        totals = np.minimum(costs, best[:, None]).sum(axis=0)
        column = int(totals.argmin())
        if taken and totals[column] > (1 - GAIN) * best.sum():
            break
        taken.append(column)
        best = np.minimum(best, costs[:, column])
    return taken


def _gather(shape: Shape, scored: Sequence[int]) -> Shape:
    """``shape`` with the counts of gathered positions, two at most, that leave least to project."""
    # A step needs a position to project even where a micro-batch trains no token.
    counts = np.maximum(np.sort(scored), 1)
    levels = np.unique(np.minimum(-(-np.ceil(1.05 * counts) // 64) * 64, shape.size)).astype(int).tolist()
    below = np.searchsorted(counts, levels, side="right").tolist()
    work: dict[tuple[int, ...], float] = {(): len(counts) * shape.size}
    for i, first in enumerate(levels):
        rest = len(counts) - below[i]
        work[first,] = below[i] * first + rest * shape.size
        for j in range(i + 1, len(levels)):
            second = below[j] - below[i]
            work[first, levels[j]] = below[i] * first + second * levels[j] + (rest - second) * shape.size
    best: tuple[int, ...] = ()
    for number in range(1, 3):
        found = min((key for key in work if len(key) == number), key=lambda key: work[key], default=())
        if work[found] <= _GATHER_BELOW ** (1 / number) * work[best]:
            best = found
    return Shape(shape.rows, shape.width, shape.shared, best)
