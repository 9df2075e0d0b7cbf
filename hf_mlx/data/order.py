"""Which rows come when: the order, the micro-batches and the step counts of a TRL run."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import DataError, SettingError
from ..settings.plan import BatchPlan
from .buckets import bucket_length
from .generator import TorchGenerator


@dataclass(frozen=True)
class Steps:
    """The counts of a run. For a stream without a length they are what ``max_steps`` implies.

    Attributes:
        batches_per_epoch: Micro-batches of one epoch, of one process; the last one may be short.
        updates_per_epoch: Optimizer steps of one epoch; the last may cover fewer micro-batches.
        total_steps: Optimizer steps of the run, the schedule's horizon.
        epochs: Epochs to start, ``sys.maxsize`` for a stream.
    """

    batches_per_epoch: int
    updates_per_epoch: int
    total_steps: int
    epochs: int


def count_steps(n_rows: int | None, plan: BatchPlan) -> Steps:
    """Count batches, updates, steps and epochs as transformers 5.23 ``Trainer.set_initial_training_values`` does.

    Args:
        n_rows: Rows of the train dataset, or None for a stream.
        plan: Batch size, accumulation, ``max_steps``, ``num_train_epochs``, ``drop_last``, ``processes`` and
            ``split_batches`` are read.

    Raises:
        SettingError: A stream without ``max_steps``.
        DataError: No row, or ``drop_last`` with fewer rows than one batch.
    """
    accumulate = plan.gradient_accumulation_steps
    if n_rows is None:
        if plan.max_steps <= 0:
            raise SettingError(
                f"a streaming train_dataset with max_steps={plan.max_steps}",
                "a dataset without a length needs the number of optimizer steps",
                "SFTConfig(max_steps=1000, ...)",
            )
        return Steps(plan.max_steps * accumulate, plan.max_steps, plan.max_steps, sys.maxsize)
    return count_batched_steps(_count_batches(n_rows, plan), plan)


def count_batched_steps(batches: int, plan: BatchPlan) -> Steps:
    """The same from the number of micro-batches of an epoch.

    Raises:
        DataError: There is none.
    """
    if batches == 0:
        raise DataError(
            "a training loader of 0 batches", "at least one batch an epoch", "look at its batch_size and drop_last"
        )
    accumulate = plan.gradient_accumulation_steps
    updates = max(math.ceil(batches / accumulate), 1)
    if plan.max_steps > 0:
        return Steps(batches, updates, plan.max_steps, math.ceil(plan.max_steps / updates))
    return Steps(batches, updates, math.ceil(plan.num_train_epochs * updates), math.ceil(plan.num_train_epochs))


def _count_batches(n_rows: int, plan: BatchPlan) -> int:
    size = plan.train_batch_size
    dealt = size if plan.split_batches else size * plan.processes
    batches = n_rows // dealt if plan.drop_last else math.ceil(n_rows / dealt)
    if batches == 0:
        shared = f" on {plan.processes} processes" if plan.processes > 1 else ""
        raise DataError(
            f"a train_dataset of {n_rows} rows with per_device_train_batch_size={size}{shared}"
            f" and dataloader_drop_last={plan.drop_last}",
            "at least one batch an epoch",
            "SFTConfig(dataloader_drop_last=False, ...)" if n_rows else "pass a train_dataset with rows",
        )
    return batches


def epoch_order(
    length: int,
    plan: BatchPlan,
    epoch: int,
    *,
    seed: int | None = None,
    lengths: Sequence[int] | None = None,
    global_rng: TorchGenerator | None = None,
) -> np.ndarray:
    """Row indices in the order that TRL's dataloader visits them in one epoch.

    Opening a torch dataloader draws one int64 from the global generator, and so do two of the samplers. Where the
    order depends on those draws, ``global_rng`` stands for that generator: seeded with ``args.seed`` once, handed in
    for every epoch, and advanced by one ``seed_int64()`` for every evaluation dataloader opened in between. That is
    TRL on a GPU, where dropout and NEFTune draw on the device's generator and leave the CPU's alone.

    Args:
        length: Rows of the dataset.
        plan: ``sampling``, ``seedable_sampler``, ``seed``, ``data_seed`` and, grouped by length, the batch size.
        epoch: The epoch, from 0; the seedable sampler adds it to the seed.
        seed: Of the seedable sampler; None takes ``data_seed``, or else ``seed``, of ``plan``.
        lengths: Tokens of each row; needed for ``group_by_length``.
        global_rng: Needed for ``group_by_length`` and ``seedable_sampler=False``; advanced if given.

    Returns:
        int64 array, shape [length]: a permutation of ``range(length)``.

    Raises:
        ValueError: The sampling needs ``lengths`` or ``global_rng`` and it is missing.

    Reference: transformers 5.23 ``Trainer._get_train_sampler``, accelerate 1.15 ``SeedableRandomSampler``,
    torch 2.13 ``RandomSampler`` and ``_BaseDataLoaderIter``.
    """
    if global_rng is not None:
        global_rng.seed_int64()  # the loader's base seed for its workers, drawn with or without workers
    if plan.sampling == "sequential":
        return np.arange(length, dtype=np.int64)
    if plan.sampling == "random" and plan.seedable_sampler:
        if seed is None:
            seed = plan.seed if plan.data_seed is None else plan.data_seed
        return TorchGenerator(seed + epoch).randperm(length)
    if global_rng is None:
        raise ValueError(f"sampling={plan.sampling!r}, seedable_sampler={plan.seedable_sampler} needs global_rng")
    if plan.sampling == "random":
        return TorchGenerator(global_rng.seed_int64()).randperm(length)
    if lengths is None or len(lengths) != length:
        raise ValueError("sampling='group_by_length' needs the length of every row")
    return group_by_length(lengths, plan.train_batch_size * plan.gradient_accumulation_steps, global_rng)


def group_by_length(lengths: Sequence[int], window: int, generator: TorchGenerator) -> np.ndarray:
    """Shuffle, cut into megabatches, sort each by falling length, and put the longest row first.

    Reference: transformers 5.23 ``trainer_pt_utils.get_length_grouped_indices``; ``window`` is its ``batch_size``,
    the rows of one optimizer step.
    """
    sizes = np.asarray(lengths)
    mega = max(min(len(sizes) // (window * 4), 50), 1) * window
    shuffled = generator.randperm(len(sizes))
    groups = [shuffled[start : start + mega] for start in range(0, len(sizes), mega)]
    # Stable on the negated length is Python's sorted(..., reverse=True): ties keep their shuffled order.
    groups = [group[np.argsort(-sizes[group], kind="stable")] for group in groups]
    longest = int(np.argmax([sizes[group[0]] for group in groups]))
    groups[0][0], groups[longest][0] = groups[longest][0], groups[0][0]
    return np.concatenate(groups)


def micro_batches(order: Sequence[int] | np.ndarray, batch_size: int, drop_last: bool = False) -> Iterator[np.ndarray]:
    """Cut an epoch's order into micro-batches of row indices; the last is short, or left out with ``drop_last``."""
    rows = np.asarray(order, dtype=np.int64)
    stop = len(rows) - len(rows) % batch_size if drop_last else len(rows)
    for start in range(0, stop, batch_size):
        yield rows[start : start + batch_size]


@dataclass(frozen=True)
class Share:
    """The part of every epoch that one of several processes reads.

    Attributes:
        rank: Of the process.
        processes: How many there are.
        split: Each batch is dealt to all of them; else each batch is one process's.
    """

    rank: int
    processes: int
    split: bool = False

    def round_rows(self, batch_size: int) -> int:
        """Rows that all processes read together, in a micro-batch each."""
        return batch_size if self.split else batch_size * self.processes

    def count(self, rows: int, batch_size: int, *, drop_last: bool = False) -> int:
        """Micro-batches of an epoch of ``rows`` rows; the same for every process."""
        dealt = self.round_rows(batch_size)
        return rows // dealt if drop_last else math.ceil(rows / dealt)

    def kept(self, rows: int, batch_size: int, *, drop_last: bool = False) -> int:
        """Of how many processes accelerate's ``gather_for_metrics`` keeps a scalar in an epoch's last round.

        It cuts what it gathers to the rows that are no repetition, as if each process had gathered one row.
        """
        rest = rows % self.round_rows(batch_size)
        return min(rest, self.processes) if rest and not drop_last else self.processes


def deal(order: Sequence[int] | np.ndarray, batch_size: int, share: Share, *, drop_last: bool = False) -> np.ndarray:
    """The micro-batches of one process: each round deals a batch to every one, the last filled from the first rows.

    Args:
        order: An epoch's row indices.
        batch_size: ``per_device_train_batch_size``.
        share: Whose.
        drop_last: Leave a round that is not full out instead of filling it.

    Returns:
        int64, shape [rounds, rows of a micro-batch].

    Reference: accelerate 1.15 ``BatchSamplerShard`` with ``even_batches``.
    """
    rows = np.asarray(order, dtype=np.int64)
    dealt = share.round_rows(batch_size)
    rounds = share.count(len(rows), batch_size, drop_last=drop_last)
    if not drop_last:
        first = rows[:dealt]
        missing = rounds * dealt - len(rows)
        rows = np.concatenate([rows, np.tile(first, math.ceil(missing / max(len(first), 1)))[:missing]])
    own = dealt // share.processes
    return rows[: rounds * dealt].reshape(rounds, share.processes, own)[:, share.rank]


def count_tokens(dataset: Any, column: str = "input_ids") -> list[int]:
    """Tokens of every row of a prepared dataset, without turning the tokens into Python numbers."""
    from pyarrow.compute import call_function

    tables = dataset.select_columns([column]).with_format("arrow").iter(batch_size=10_000)
    return [n for table in tables for n in call_function("list_value_length", [table[column]]).to_pylist()]


def longest_row(dataset: Any, otherwise: int) -> int:
    """Tokens of the longest row, in its bucket; ``otherwise`` where only reading all rows would tell."""
    if not hasattr(dataset, "__len__") or "input_ids" not in (getattr(dataset, "column_names", None) or ()):
        return otherwise
    return bucket_length(max(count_tokens(dataset), default=1))
