"""Micro-batches in HF's order, from an in-memory dataset or a stream."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

import numpy as np

from ..errors import TrainingError
from .collate import Batch
from .order import Share, deal

Item = TypeVar("Item")
Rows = list[dict[str, Any]]
Collate = Callable[[Rows], Batch]
# Row indices of an epoch, counted from 0.
Order = Callable[[int], np.ndarray]


class RowLoader:
    """Micro-batches of a ``datasets.Dataset``.

    Args:
        dataset: A prepared dataset.
        batch_size: Rows in a micro-batch.
        collate: Rows to a :class:`~hf_mlx.data.collate.Batch`.
        order: Row indices of an epoch; None reads from first to last.
        drop_last: Leave out a last micro-batch that is not full.
        share: The part of one of several processes; None reads every row.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        collate: Collate,
        *,
        order: Order | None = None,
        drop_last: bool = False,
        share: Share | None = None,
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.collate = collate
        self.order = order
        self.drop_last = drop_last
        self.share = share

    def __len__(self) -> int:
        rows = len(self.dataset)
        if self.share is not None:
            return self.share.count(rows, self.batch_size, drop_last=self.drop_last)
        return rows // self.batch_size if self.drop_last else -(-rows // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return self.batches(0)

    def batches(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """Micro-batches of ``epoch``, without the first ``skip``; drawn in order now, read when asked for."""
        order = np.arange(len(self.dataset)) if self.order is None else self.order(epoch)
        return self._cut(order, range(skip, len(self)))

    def kept(self, number: int) -> int:
        """Processes whose metrics of micro-batch ``number`` count; see :meth:`~hf_mlx.data.order.Share.kept`."""
        if self.share is None:
            return 1
        if number < len(self) - 1:
            return self.share.processes
        return self.share.kept(len(self.dataset), self.batch_size, drop_last=self.drop_last)

    @property
    def remainder(self) -> int:
        """Rows of a last round of several processes that is not full; 0 where it is left out."""
        if self.share is None or self.drop_last:
            return 0
        return len(self.dataset) % self.share.round_rows(self.batch_size)

    def sample(self, count: int) -> Iterator[Batch]:
        """Up to ``count`` micro-batches, spread evenly over the first epoch, in an order that any part of is, too."""
        order = np.arange(len(self.dataset)) if self.order is None else self.order(0)
        numbers = np.unique(np.linspace(0, len(self) - 1, count).astype(int))
        return self._cut(order, np.random.default_rng(0).permutation(numbers).tolist())

    def _cut(self, order: np.ndarray, numbers: Iterable[int]) -> Iterator[Batch]:
        dealt = self.share and deal(order, self.batch_size, self.share, drop_last=self.drop_last)
        for batch in numbers:
            chosen = order[batch * self.batch_size : (batch + 1) * self.batch_size] if dealt is None else dealt[batch]
            yield self.collate(_fetch(self.dataset, chosen.tolist()))


class StreamLoader:
    """Micro-batches of an ``IterableDataset``, in the stream's own order; it has no length.

    A last one that is not full is kept whatever ``dataloader_drop_last`` says, as transformers 5.23
    ``Trainer._get_dataloader`` does for streams. Of several processes each reads shards of its own where there are
    enough, and else its part of every round of rows (accelerate 1.15 ``prepare_data_loader``).

    Args:
        dataset: A stream.
        batch_size: Rows in a micro-batch.
        collate: Rows to a :class:`~hf_mlx.data.collate.Batch`.
        share: The part of one of several processes; None reads every row.

    Attributes:
        has_own_shards: Whether the process reads shards of its own, which may end before those of others.
    """

    def __init__(self, dataset: Any, batch_size: int, collate: Collate, *, share: Share | None = None) -> None:
        self.has_own_shards = share is not None and has_shards(dataset, share)
        if share is not None and self.has_own_shards:
            dataset, share = dataset.shard(num_shards=share.processes, index=share.rank), None
        self.dataset = dataset
        self.batch_size = batch_size if share is None else share.round_rows(batch_size) // share.processes
        self.collate = collate
        self.share = share

    def __iter__(self) -> Iterator[Batch]:
        return self.batches(0)

    def batches(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """Micro-batches of ``epoch``, without the first ``skip``."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        read = iter(self.dataset) if self.share is None else self._deal(self.share)
        rows = islice(read, skip * self.batch_size, None)
        while chosen := list(islice(rows, self.batch_size)):
            yield self.collate(chosen)

    def _deal(self, share: Share) -> Iterator[dict[str, Any]]:
        """This process's rows; the last round is filled from the first."""
        rows, first = iter(self.dataset), []
        own = slice(share.rank * self.batch_size, (share.rank + 1) * self.batch_size)
        dealt = self.batch_size * share.processes
        while block := list(islice(rows, dealt)):
            first = first or block
            while len(block) < dealt:
                block = block + first
            yield from block[own]


def has_shards(dataset: Any, share: Share) -> bool:
    """Whether a stream has shards for every process."""
    return not share.split and hasattr(dataset, "shard") and getattr(dataset, "n_shards", 0) >= share.processes


def _fetch(dataset: Any, numbers: list[int]) -> Rows:
    # As torch's loader asks for the rows of a batch.
    if hasattr(dataset, "__getitems__"):
        return dataset.__getitems__(numbers)
    return [dataset[number] for number in numbers]


def make_loader(
    dataset: Any,
    batch_size: int,
    collate: Collate,
    *,
    order: Order | None = None,
    drop_last: bool = False,
    share: Share | None = None,
) -> RowLoader | StreamLoader:
    """The loader that fits ``dataset``; arguments as for :class:`RowLoader`."""
    if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        return RowLoader(dataset, batch_size, collate, order=order, drop_last=drop_last, share=share)
    return StreamLoader(dataset, batch_size, collate, share=share)


def read_ahead(items: Iterator[Item], count: int) -> Iterator[Item]:
    """``items`` in their order, up to ``count`` of them made on another thread before they are asked for.

    What making one raises is raised when that one is asked for.

    Raises:
        TrainingError: The system has no thread to give.
    """
    end: Any = object()
    pool = ThreadPoolExecutor(1, thread_name_prefix="rows")
    try:
        try:
            made = deque(pool.submit(next, items, end) for _ in range(count))
        except RuntimeError as error:
            raise TrainingError(
                f"no thread to prepare the next batch on ({error})",
                "one thread beside the training, which this system does not give",
                "end other programs, or raise its limit: ulimit -u 4096",
            ) from error
        while (item := made.popleft().result()) is not end:
            made.append(pool.submit(next, items, end))
            yield item
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
