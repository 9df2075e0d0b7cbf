"""Packing documents into rows of a fixed length, bin for bin as trl 1.16 packs them.

The strategies are TRL's: ``bfd`` (best-fit decreasing; documents longer than a row are cut), ``bfd_split`` (they are
split instead) and ``wrapped`` (one stream of tokens, chopped). Best-fit decreasing follows Ding et al., "Fewer
Truncations Improve Language Modeling" (arXiv 2404.10830), within each batch of 1,000 documents.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict, deque
from typing import Any

import numpy as np

#: Documents packed at a time; ``datasets.map``'s default batch, which TRL uses. Bins depend on it.
PACKING_BATCH = 1000


def pack_rows(dataset: Any, length: int, strategy: str, **options: Any) -> Any:
    """Packs a dataset of ``input_ids`` and ``labels``.

    Args:
        dataset: A Dataset or IterableDataset with just those two columns.
        length: Tokens a row holds at most.
        strategy: ``bfd``, ``bfd_split`` or ``wrapped``.
        options: Passed to ``dataset.map`` (``num_proc``, ``desc``).

    Returns:
        The packed dataset. bfd strategies add ``seq_lengths``, the lengths of the documents in each row.
    """
    function = pack_wrapped if strategy == "wrapped" else pack_best_fit
    settings = {"length": length} if strategy == "wrapped" else {"length": length, "split": strategy == "bfd_split"}
    arrow = dataset.with_format("arrow")
    packed = arrow.map(function, batched=True, batch_size=PACKING_BATCH, fn_kwargs=settings, **options)
    return packed.with_format(None)


def pack_best_fit(table: Any, length: int, split: bool) -> Any:
    """One batch under best-fit decreasing.

    Args:
        table: pyarrow table whose columns are lists of equal lengths.
        length: Tokens a row holds at most.
        split: Split documents longer than a row into several; otherwise cut them.

    Returns:
        A pyarrow table of the same columns, and ``seq_lengths``.
    """
    import pyarrow as pa

    starts, sizes, columns = _read_lists(table)
    starts, sizes = _split_long(starts, sizes, length) if split else (starts, np.minimum(sizes, length))
    starts, sizes = starts[sizes > 0], sizes[sizes > 0]
    bins = fill_bins(sizes, length)
    order = np.fromiter((document for bin in bins for document in bin), np.int64)
    counts = np.fromiter(map(len, bins), np.int64, len(bins))
    taken = _gather(starts[order], sizes[order])
    ends = np.cumsum(sizes[order])
    bounds = np.concatenate(([0], ends))[np.concatenate(([0], np.cumsum(counts)))]
    packed = [_list_array(values[taken], bounds) for values in columns]
    packed.append(_list_array(sizes[order].astype(np.int32), np.concatenate(([0], np.cumsum(counts)))))
    return pa.Table.from_arrays(packed, names=[*table.column_names, "seq_lengths"])


def pack_wrapped(table: Any, length: int) -> Any:
    """One batch as a stream of tokens, chopped every ``length``; document borders are not kept."""
    import pyarrow as pa

    starts, sizes, columns = _read_lists(table)
    taken = _gather(starts, sizes)
    bounds = np.append(np.arange(0, len(taken), length), len(taken))
    return pa.Table.from_arrays([_list_array(values[taken], bounds) for values in columns], names=table.column_names)


def _read_lists(table: Any) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Start and size of each list, shared by all columns, and each column's flat values."""
    flat, layout = [], None
    for column in table.combine_chunks().columns:
        array = column.chunks[0] if column.num_chunks else column.combine_chunks()
        sizes = np.diff(array.offsets.to_numpy().astype(np.int64))
        layout = sizes if layout is None else layout
        assert np.array_equal(layout, sizes), "input_ids and labels differ in length"
        flat.append(array.flatten().to_numpy())
    assert layout is not None
    return np.cumsum(layout) - layout, layout, flat


def _split_long(starts: np.ndarray, sizes: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    pieces = -(-sizes // length)
    first = np.repeat(np.cumsum(pieces) - pieces, pieces)
    within = (np.arange(pieces.sum()) - first) * length
    return np.repeat(starts, pieces) + within, np.minimum(np.repeat(sizes, pieces) - within, length)


def fill_bins(sizes: np.ndarray, length: int) -> list[list[int]]:
    """Document numbers of each bin: longest first, each into the fullest open bin it fits, the oldest on a tie."""
    bins: list[list[int]] = []
    open_bins: defaultdict[int, deque[list[int]]] = defaultdict(deque)
    spaces: list[int] = []
    for document in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[document])
        position = bisect_left(spaces, size)
        if position == len(spaces):
            space = length
            bin: list[int] = []
            bins.append(bin)
        else:
            space = spaces[position]
            bin = open_bins[space].popleft()
            if not open_bins[space]:
                del spaces[position]
        bin.append(document)
        space -= size
        if space > 0:
            if not open_bins[space]:
                insort(spaces, space)
            open_bins[space].append(bin)
    return bins


def _gather(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Indices of the tokens of all documents, in order."""
    offsets = np.cumsum(sizes) - sizes
    return np.arange(int(sizes.sum())) + np.repeat(starts - offsets, sizes)


def _list_array(values: np.ndarray, bounds: np.ndarray) -> Any:
    import pyarrow as pa

    return pa.ListArray.from_arrays(pa.array(bounds.astype(np.int32)), pa.array(values))
