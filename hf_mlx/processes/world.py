"""The processes of a run, and all that they exchange outside of the compiled step."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from ..device import MEGABYTES, Coming, start_depth_first
from ..errors import SettingError, TrainingError
from .launcher import Launched, read_launcher, read_tensor_parallel
from .tables import HEAD, Sent, check_bytes, head_table, is_whole
from .watch import Watch

logger = logging.getLogger(__name__)


class World:
    """Every process of the run. One that was started by itself is a world of one, without ``mx.distributed``.

    All methods that exchange something are called by every process in the same order, from the main thread.

    Attributes:
        rank: Which process this is.
        size: How many there are.
        local_rank: Which process of its machine this is.
        group: MLX's group; None for one process.
        watch: Knows when another process has ended; None for one process.
        width: Numbers of a table; one for all of them, so that processes at unlike exchanges understand each other.
        tensor_parallel: They hold one model together, and all read the same rows.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, local_rank: int = 0, group: Any = None, host: str | None = None
    ) -> None:
        self.rank, self.size, self.local_rank, self.group = rank, size, local_rank, group
        self.watch = None if group is None else Watch(rank, size)
        self.width = 64
        self.tensor_parallel = False
        self._host, self._has_met, self._tables = host, group is None, 0
        self._left: Sent | None = None

    @property
    def is_alone(self) -> bool:
        """Whether there is one process."""
        return self.size == 1

    @property
    def sharing(self) -> World:
        """The processes that share the rows: all of them, or this one alone where they hold one model together."""
        return World() if self.tensor_parallel else self

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    @property
    def is_local_main(self) -> bool:
        """Whether this process is the first of its machine."""
        return self.local_rank == 0

    def meet(self) -> None:
        """Let the processes know each other's lines; the first exchange does it where nobody has called this before.

        Exchanges are computed, and MLX's limits on pending work hold from its first computation on: a run that knows
        its own sets them before.
        """
        if self._has_met or self.watch is None:
            return
        self._has_met = True
        start_depth_first(MEGABYTES)
        address = self.watch.listen(self._host) if self.is_main else None
        self.watch.connect(*self.hand_on(address, "the start"))
        self.barrier("the start")

    @contextmanager
    def meeting(self) -> Iterator[None]:
        """A block at whose end the processes meet; one that fails in it is still able to say why."""
        try:
            yield
        except BaseException:
            with suppress(TrainingError):
                self.meet()
            raise
        self.meet()

    def gather(self, kind: str, table: np.ndarray, what: str = "") -> np.ndarray:
        """The int32 tables of all processes, shape [size, numbers].

        Args:
            kind: What the table is for. Every process must be at the same kind of exchange, which is checked.
            table: Of this process, shape [numbers]; no longer than :attr:`width`, and as long on all of them.
            what: What is waited for, for messages.

        Raises:
            TrainingError: Another process has ended, or is at something else.
        """
        return self.read(self.gather_later(kind, table), kind, what)

    def gather_later(self, kind: str, table: np.ndarray, *, with_step: bool = False) -> Sent:
        """Begin :meth:`gather` without waiting for it; :meth:`read` has its end.

        Args:
            kind, table: As there.
            with_step: Begin once the next step is ordered, where a device has least to do: MLX would hold the host
                back before.
        """
        self.meet()
        self._tables += 1
        padded = head_table(kind, self._tables, table, self.width)
        self.begin()
        self._left = sent = Sent(lambda: Coming(self._begin(padded)))
        if not with_step:
            self.begin()
        return sent

    def begin(self) -> None:
        """Begin what was left for the time of a step."""
        if (sent := self._left) is not None:
            self._left = None
            sent.begin()

    def read(self, sent: Sent, kind: str, what: str = "") -> np.ndarray:
        """Wait for what the other processes send."""
        self.begin()
        with self.waiting(what or kind):
            tables = sent.read()
        other = np.flatnonzero(tables[:, 0] != tables[self.rank, 0])
        # The ring's first exchange after it has lost a process ends without an error, with nothing in it, a part, or
        # what was there before.
        are_whole = all(map(is_whole, tables))
        is_old = not len(other) and (tables[:, 1] != tables[self.rank, 1]).any()
        if not are_whole or is_old or (len(other) and self.watch and self.watch.name_ended()):
            raise self.lost(what or kind)
        if len(other):
            raise TrainingError(
                f"rank {self.rank} at {what or kind!r}, and rank {other[0]} at something else",
                "all processes do the same in the same order: what one asks for alone (a save, an evaluation, a "
                "prediction), the others never answer",
                "ask for it on every rank: callbacks and scripts run on all of them, and only rank 0 writes",
            )
        return tables[:, HEAD : HEAD + int(tables[self.rank, 3])]

    def _begin(self, array: np.ndarray) -> mx.array:
        self.meet()
        # The added dimension is numpy's: an operation of MLX's would wait behind what the GPU is at.
        own = mx.array(array[None])
        return mx.distributed.all_gather(own, group=self.group) if self.group is not None else own

    def gather_bytes(self, data: bytes, what: str = "") -> list[bytes]:
        """The bytes of all processes, by rank."""
        if self.is_alone:
            return [data]
        check = check_bytes(data)
        lengths, checks = self.gather(f"bytes {what}", np.array([len(data), check]), what).T
        padded = np.zeros(max(-(-int(lengths.max()) // 4) * 4, 4), np.uint8)
        padded[: len(data)] = np.frombuffer(data, np.uint8)
        with self.waiting(what):
            parts = np.array(self._begin(padded.view(np.int32)))
        made = [part.tobytes()[:length] for part, length in zip(parts, lengths, strict=True)]
        if [check_bytes(part) for part in made] != checks.tolist():
            # What was under way when a process ended has no error of its own.
            raise self.lost(what)
        return made

    def gather_object(self, value: Any, what: str = "") -> list[Any]:
        """What JSON can say, of all processes, by rank."""
        return [json.loads(data) for data in self.gather_bytes(json.dumps(value).encode(), what)]

    def hand_on(self, value: Any, what: str = "") -> Any:
        """What JSON can say, of rank 0."""
        return self.gather_object(value if self.is_main else None, what)[0]

    def hand_on_bytes(self, chunks: Iterator[bytes], what: str = "") -> Iterator[bytes]:
        """The bytes of rank 0 in pieces, of any size together; ``chunks`` is read on rank 0 alone."""
        while True:
            piece = next(chunks, b"") if self.is_main else b""
            piece = self.gather_bytes(piece, what)[0]
            if not piece:
                return
            yield piece

    def barrier(self, what: str = "") -> None:
        """Wait until every process is here."""
        if not self.is_alone:
            self.gather(f"barrier {what}", np.zeros(1), what)

    def sum(self, arrays: Mapping[str, mx.array], what: str = "") -> dict[str, mx.array]:
        """Element by element the sum over all processes."""
        if self.is_alone:
            return dict(arrays)
        made = {}
        with self.waiting(what):
            for name, array in arrays.items():
                made[name] = mx.distributed.all_sum(array, group=self.group)
                mx.eval(made[name])
        return made

    def gather_array(self, array: mx.array, what: str = "") -> list[mx.array]:
        """The arrays of all processes, by rank, evaluated; they have one shape and dtype."""
        with self.waiting(what):
            gathered = mx.distributed.all_gather(array[None], group=self.group)
            mx.eval(gathered)
        return list(gathered)

    @contextmanager
    def waiting(self, what: str = "", *, computes: bool = False) -> Iterator[None]:
        """A block that waits for other processes, and says which one has ended where it would wait for ever.

        Args:
            what: What for, for messages.
            computes: It has work of its own beside.

        Raises:
            TrainingError: Another process has ended.
        """
        if self.watch is None:
            yield
            return
        with self.watch.waiting(what, computes=computes):
            try:
                yield
            except RuntimeError as error:
                if not is_lost(error):
                    raise
                raise self.lost(what) from error

    def check(self, what: str = "") -> None:
        """Look between two pieces of own work whether the others are still there, without waiting.

        Raises:
            TrainingError: Another process has failed and is gone.
        """
        if self.watch is not None and self.watch.is_left:
            raise self.lost(what)

    def lost(self, what: str = "") -> TrainingError:
        """The error of a process that others have left."""
        who = self.watch.name_ended() if self.watch is not None else None
        return TrainingError(
            f"{who or 'another process has ended; its own message is above'}{f', at {what}' if what else ''}",
            f"all {self.size} processes to the end of the run: this one, rank {self.rank}, cannot go on alone",
            "mend what that message names, then trainer.train(resume_from_checkpoint=True) on all of them",
        )


def is_lost(error: BaseException) -> bool:
    """Whether MLX raised it because another process has ended."""
    text = str(error).lower()
    return "connection to a peer was lost" in text or ("[ring]" in text and "recv" in text) or "nccl" in text


@cache
def the_world() -> World:
    """The world of this process, begun when it is first asked for.

    Raises:
        SettingError: A launcher promised other processes that are not there.
    """
    launched = read_launcher()
    if launched is None:
        read_tensor_parallel(1)
        return World()
    world = _join(launched)
    world.tensor_parallel = read_tensor_parallel(world.size)
    return world


def report_failure(error: BaseException) -> None:
    """Let the other processes know why this one ends, where there are others."""
    if the_world.cache_info().currsize and (watch := the_world().watch) is not None:
        watch.fail(error)


def _join(launched: Launched) -> World:
    try:
        group = mx.distributed.init(strict=True, backend=launched.backend)
    except (RuntimeError, ValueError) as error:
        raise SettingError(
            f"rank {launched.rank} of {launched.size or 'several'} processes, which backend {launched.backend!r} "
            f"does not connect ({error})",
            "processes that reach each other",
            "hf-mlx launch --hostfile hosts.json train.py, with addresses that the machines can ping",
        ) from error
    promised = launched.size or 2
    if group.size() == 1 and promised > 1:
        raise SettingError(
            f"a launcher of {promised} processes, and MLX that sees one",
            "all of them in one group: else each would train alone and write into the same folder",
            f"hf-mlx launch -n {promised} train.py",
        )
    return World(group.rank(), group.size(), launched.local_rank, group, launched.host)
