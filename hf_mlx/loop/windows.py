"""The windows of an epoch, on one process or on several that have to be at the same step."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np

from ..checkpoints.interrupt import Interrupt
from ..data.collate import Batch
from ..data.loader import RowLoader, StreamLoader
from ..data.own_loader import OwnLoader
from ..errors import TrainingError
from ..feed import Loader
from ..processes.world import Sent, World
from ..training.inputs import PEER_COLUMNS, HostInputs, Inputs, Peers

logger = logging.getLogger(__name__)

Laid = tuple[Batch, HostInputs]
Window = list[tuple[Batch, Inputs]]

# What a process tells the others before each step, as bits.
_EPOCH_STOP, _TRAINING_STOP, _INTERRUPT = 1, 2, 4
_STOPS = _EPOCH_STOP | _TRAINING_STOP
_COLUMNS = len(PEER_COLUMNS)
_KIND = "the counts of a step"


class Windows:
    """The windows of one epoch as one process reads them.

    Args:
        batches: Micro-batches.
    """

    def __init__(self, batches: Iterator[Laid]) -> None:
        self._batches = batches

    def take(self, size: int, following: int) -> Window:
        """The next window.

        Args:
            size: Its micro-batches; fewer come where a stream ends.
            following: Those of the one after it in this epoch; 0 for none.
        """
        return [(batch, laid.to_device()) for batch, laid in islice(self._batches, size)]

    def end(self) -> None:
        """The epoch is over, with all that was due at its end."""


class SharedWindows(Windows):
    """The windows of one epoch on several processes: each knows what the others count, and when one wants to stop.

    What is counted is sent a window ahead, before the step in between is computed, so that nobody waits for that step.
    A stop therefore shows in the table of the window after the next. A process that wants to stop reads that table at
    once: where all want to, none of them takes another step, as under torch. Rows of a stream, and those of a collator
    of the script's own, which may draw random numbers, are not read ahead: their counts are sent when they are due.

    Args:
        batches: Micro-batches of this process.
        loader: That they come from.
        world: The processes.
        control: Gives the control of the run, which may ask to stop.
        interrupt: Ctrl-C on this process.
        accumulation: Micro-batches of a full window.
        ahead: Whether the next window may be read before this one is trained.
        average: ``average_tokens_across_devices``.
        pad_token_id: Of the tokenizer, or None.
        step: Gives the number of the last step.
    """

    def __init__(
        self,
        batches: Iterator[Laid],
        loader: Loader,
        world: World,
        control: Any,
        interrupt: Interrupt,
        *,
        accumulation: int,
        ahead: bool,
        average: bool,
        pad_token_id: int | None,
        step: Any,
    ) -> None:
        super().__init__(batches)
        self._loader, self._world, self._control, self._interrupt = loader, world, control, interrupt
        self._accumulation, self._average, self._pad_token_id = accumulation, average, pad_token_id
        self._ahead = ahead and isinstance(loader, RowLoader)
        self._has_own_shards = isinstance(loader, StreamLoader) and loader.has_own_shards
        self._step = step
        self._first = True
        self._next: list[Laid] | None = None
        self._sent: Sent | None = None
        self._table: np.ndarray | None = None

    def take(self, size: int, following: int) -> Window:
        """The next window; empty also where all are to stop before it.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed on one of the processes.
            TrainingError: Another process has ended, or has other micro-batches in its window.
        """
        watch = self._world.watch
        if watch is not None:
            watch.say(self._step() + 1)
        try:
            return self._take_ahead(size, following) if self._ahead else self._take_now(size, last=following == 0)
        finally:
            self._first = False

    def _take_now(self, size: int, *, last: bool) -> Window:
        window = list(islice(self._batches, size))
        flags = self._flags()
        if not window and not (flags and self._has_own_shards):
            return []
        table = self._receive(self._send(window, flags))
        if self._obey(table[:, 0]):
            return []
        return self._with_peers(window, table, last=last)

    def _take_ahead(self, size: int, following: int) -> Window:
        if self._next is None:
            self._next = list(islice(self._batches, size))
            self._sent = self._send(self._next, self._flags())
        window, table = self._next, self._table
        if table is None:
            table = self._receive(self._sent)
        self._table = None
        if self._obey(table[:, 0]):
            return []
        self._next = list(islice(self._batches, following))
        flags = self._flags()
        self._sent = self._send(self._next, flags, with_step=True)
        if flags & _STOPS:
            # Whether the others want to stop as well must be known before the step.
            self._table = self._receive(self._sent)
            if (self._table[:, 0] & _STOPS).all():
                self._obey(self._table[:, 0])
                return []
        return self._with_peers(window, table, last=following == 0)

    def end(self) -> None:
        """Agree on whether the run goes on.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed on one of the processes.
        """
        if self._has_own_shards:
            return
        self._first = False
        flags = self._flags() & ~_EPOCH_STOP
        self._obey(
            self._world.gather("the end of an epoch", np.array([flags]), f"the end of step {self._step()}")[:, 0]
        )

    def _flags(self) -> int:
        control = self._control()
        stops = _EPOCH_STOP * bool(control.should_epoch_stop) | _TRAINING_STOP * bool(control.should_training_stop)
        # Upstream looks after a step only: a stop that was asked for before the first lets it pass.
        return (0 if self._first else stops) | _INTERRUPT * self._interrupt.is_requested

    def _obey(self, flags: np.ndarray) -> bool:
        """Do what one of the processes asks all to do; whether they stop."""
        if (flags & _INTERRUPT).any():
            raise KeyboardInterrupt
        asked = int(np.bitwise_or.reduce(flags)) & _STOPS
        if not asked:
            return False
        if not (flags == flags[0]).all():
            who = ", ".join(str(rank) for rank in np.flatnonzero(flags & _STOPS))
            logger.warning(
                f"A callback on rank {who} asked to stop, and none on the others: all stop after step {self._step()}."
            )
        control = self._control()
        control.should_epoch_stop |= bool(asked & _EPOCH_STOP)
        control.should_training_stop |= bool(asked & _TRAINING_STOP)
        return True

    def _send(self, window: list[Laid], flags: int, *, with_step: bool = False) -> Sent:
        table = np.zeros(3 + _COLUMNS * self._accumulation, np.int32)
        table[:3] = flags, self._step(), len(window)
        counts = table[3:].reshape(self._accumulation, _COLUMNS)
        for row, (batch, laid) in zip(counts, window, strict=False):
            real = batch.count_input_tokens(self._pad_token_id)
            row[:] = laid.valid, laid.labelled, laid.tokens, batch.input_ids.size, real, laid.chosen, laid.pairs
        return self._world.gather_later(_KIND, table, with_step=with_step)

    def _receive(self, sent: Sent | None) -> np.ndarray:
        assert sent is not None
        table = self._world.read(sent, _KIND, f"step {self._step() + 1}")
        counts, steps = table[:, 2], table[:, 1]
        flagged = (table[:, 0] & _STOPS).any()
        if not flagged and not ((counts == counts[0]).all() and (steps == steps[0]).all()):
            raise TrainingError(
                f"windows of {counts.tolist()} micro-batches on ranks 0 to {len(counts) - 1}, at step {steps.tolist()}",
                "the same number on all of them: the shards of this stream are of unlike length, and one of them ends "
                "inside a window",
                "gradient_accumulation_steps=1, a smaller max_steps, or to_iterable_dataset(num_shards=1)",
            )
        return table

    def _with_peers(self, window: list[Laid], table: np.ndarray, *, last: bool) -> Window:
        if self._world.tensor_parallel:
            return self._alike(window, table)
        counts = table[:, 3:].reshape(self._world.size, -1, _COLUMNS)
        kept, remainder = self._world.size, 0
        if last and isinstance(self._loader, RowLoader | OwnLoader):
            remainder = self._loader.remainder
        if last and isinstance(self._loader, RowLoader):
            kept = self._loader.kept(len(self._loader) - 1)
        elif last and isinstance(self._loader, OwnLoader):
            kept = self._loader.kept(kept)
        made = []
        for number, (batch, laid) in enumerate(window):
            columns = (tuple(column) for column in counts[:, number].T.tolist())
            peers = Peers(self._world.rank, *columns, kept=kept, remainder=remainder, average=self._average)
            made.append((batch, replace(laid.to_device(), peers=peers)))
        return made

    def _alike(self, window: list[Laid], table: np.ndarray) -> Window:
        """The window of processes that hold one model together, each of which reads all rows."""
        other = np.flatnonzero((table[:, 2:] != table[0, 2:]).any(axis=1))
        if len(other):
            raise TrainingError(
                f"other rows on rank {other[0]} than on rank 0 at step {self._step() + 1}",
                "the same rows on all processes that hold one model together",
                "a data_collator without random numbers of its own, and a stream that every process reads alike",
            )
        return [(batch, laid.to_device()) for batch, laid in window]


def open_windows(batches: Iterator[Laid], loop: Any) -> Windows:
    """The windows of ``batches``, the micro-batches of an epoch of ``loop``."""
    world, plan = loop.world, loop.plan.batch
    if world.is_alone:
        return Windows(batches)
    return SharedWindows(
        batches,
        loop.loader,
        world,
        lambda: loop.host.control,
        loop.interrupt,
        accumulation=plan.gradient_accumulation_steps,
        ahead=loop.data.collator is None,
        average=plan.average_tokens,
        pad_token_id=getattr(loop.data.tokenizer, "pad_token_id", None),
        step=lambda: loop.host.state.global_step,
    )
