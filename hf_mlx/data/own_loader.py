"""Batches of a loader that the script made, in its own order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..errors import DataError
from .batch import Batch
from .process_generator import ProcessGenerator


class OwnLoader:
    """Micro-batches of a loader that an override of ``get_train_dataloader``, or of a sampler, has made.

    torch's global generator is the run's: what a sampler draws from it is what it would draw under TRL.

    Args:
        loader: Yields dicts of tensors; a torch ``DataLoader`` or anything that can be iterated once an epoch.
        convert: Reads such a dict into a batch.
        rng: The run's generator.
        method: What made the loader, for errors.

    Attributes:
        loader: As it was given.
        collate: Reads what it yields into a batch.
    """

    def __init__(
        self, loader: Any, convert: Callable[[Mapping[str, Any]], Batch], rng: ProcessGenerator, method: str
    ) -> None:
        if not hasattr(loader, "__iter__"):
            raise DataError(
                f"{method}() that returned a {type(loader).__name__}",
                "a torch DataLoader, or another iterable of batches",
                "return torch.utils.data.DataLoader(self.train_dataset, collate_fn=self.data_collator, …)",
            )
        self.loader = loader
        self.collate = convert
        self._rng = rng
        self._method = method
        self._first_rows = 1

    @property
    def dataset(self) -> Any:
        """The loader's rows, or None where it does not say."""
        return getattr(self.loader, "dataset", None)

    @property
    def batches_per_epoch(self) -> int | None:
        """Its length, or None for a stream."""
        try:
            return len(self.loader)
        except (TypeError, AttributeError, NotImplementedError):
            return None

    @property
    def batch_size(self) -> int:
        """Rows of a batch as the loader says; those of the last epoch's first batch where it does not."""
        said = getattr(self.loader, "batch_size", None) or (self.is_prepared and self.loader.total_batch_size)
        return said or self._first_rows

    @property
    def is_prepared(self) -> bool:
        """Whether it went through ``accelerator.prepare``, as transformers' own loaders do."""
        return hasattr(self.loader, "gradient_state")

    @property
    def drops_last(self) -> bool:
        """Whether accelerate leaves its last batch uncut, because it was asked to drop one that is not full."""
        return bool(getattr(self.loader, "_drop_last", False))

    @property
    def remainder(self) -> int:
        """Rows of a last round that is not full, to which accelerate cuts what is gathered; 0 where it cuts nothing."""
        cut = self.is_prepared and not self.drops_last and hasattr(self.dataset, "__len__")
        return len(self.dataset) % self.batch_size if cut else 0

    def kept(self, processes: int) -> int:
        """Of how many processes metrics count at the end of an epoch; see :meth:`~hf_mlx.data.order.Share.kept`."""
        return min(self.remainder, processes) or processes

    def __iter__(self) -> Iterator[Batch]:
        return self.batches(None)

    def batches(self, epoch: int | None, skip: int = 0) -> Iterator[Batch]:
        """Micro-batches of ``epoch``, without the first ``skip``, which are read at once."""
        self._rng.join()
        if epoch is not None:
            _set_epoch(self.loader, epoch)
        read = iter(self.loader)
        for _ in range(skip):
            next(read, None)
        return self._read(read)

    def _read(self, read: Iterator[Any]) -> Iterator[Batch]:
        first = True
        for batch in read:
            if not isinstance(batch, Mapping):
                raise DataError(
                    f"a {type(batch).__name__} from the loader of {self._method}()",
                    "batches that are dicts of input_ids, labels and attention_mask",
                    "torch.utils.data.DataLoader(..., collate_fn=self.data_collator)",
                )
            made = self.collate(batch)
            if first:
                self._first_rows, first = len(made.input_ids), False
            yield made


def _set_epoch(loader: Any, epoch: int) -> None:
    # transformers 5.23 ``Trainer._run_epoch``.
    if hasattr(loader, "set_epoch"):
        loader.set_epoch(epoch)
    inner: Any = getattr(getattr(loader, "batch_sampler", None), "batch_sampler", None)
    if hasattr(inner, "set_epoch"):
        inner.set_epoch(epoch)
