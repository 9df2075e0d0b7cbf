"""A step whose rows go over the cores of a Linux CPU.

MLX's CPU backend runs all but matrix products on one core. Rows do not depend on each other, so here each core takes
some of them through the whole step, with products on one thread, and the gradients are added up.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache, reduce
from threading import Barrier, BrokenBarrierError
from typing import Any

import mlx.core as mx

from ..blas import blas_threads, single_threaded_blas
from ..device import on_cpu
from ..settings.clipping import GradClip
from .backward_order import noting_places
from .objective import Objective
from .optim import Optimizer
from .splitting import split_arrays
from .step import Arrays, Step, add
from .weighting import Weights


class LanedStep(Step):
    """:class:`~hf_mlx.training.step.Step` with the rows of a micro-batch in lanes; rounding apart its numbers.

    Args:
        pool: As many threads as there are lanes; see :func:`start_threads`.
        lanes: Cores to use.
        options: Those of the base class.
    """

    def __init__(self, *args: Any, pool: ThreadPoolExecutor, lanes: int, **options: Any) -> None:
        super().__init__(*args, **options)
        self.lanes = lanes
        self._streams = [_stream(lane) for lane in range(lanes)]
        self._pool = pool

    def _compile(self) -> None:
        super()._compile()
        self._accumulate_lane = self._wrap(self._accumulate_noting)

    def _accumulate_noting(self, params: Arrays, arrays: Arrays, weights: Weights) -> tuple[Any, list[mx.array]]:
        with noting_places() as places:
            carry = self._accumulate_micro(params, None, arrays, weights)
        return carry, places

    def _count(self, arrays: Arrays) -> int:
        """Lanes for a piece: one where its rows would leave most cores idle, which its products then use."""
        rows = arrays["input_ids"].shape[0] // self.objective.rows_together(arrays)
        return min(rows, self.lanes) if 2 * rows > self.lanes else 1

    def _updates_with_last(self, pieces: Sequence[tuple[Arrays, Weights]]) -> bool:
        return super()._updates_with_last(pieces) and all(self._count(arrays) == 1 for arrays, _ in pieces)

    def _accumulate_all(self, pieces: Sequence[tuple[Arrays, Weights]]) -> None:
        # One piece after the other: no more rows are under way than without lanes.
        for arrays, weights in pieces:
            count = self._count(arrays)
            if count == 1:
                super()._accumulate_all([(arrays, weights)])
                continue
            grads, sums = zip(*filter(None, (self._carry, *self._run(arrays, weights, count))), strict=True)
            self._carry = reduce(add, grads), reduce(add, sums)
            mx.async_eval(self._carry)

    def _run(self, arrays: Arrays, weights: Weights, count: int) -> list[Any]:
        """What each of ``count`` lanes makes of its rows of a piece, evaluated."""
        self._begin_left()
        # The lanes wait for nothing that is still under way on this thread.
        mx.eval(self._params)
        carries, under_way, first_row, pace = [], [], 0, Barrier(count)
        with single_threaded_blas():
            try:
                for lane, part in enumerate(split_arrays(arrays, count, self.objective.rows_together(arrays))):
                    part |= {"key": arrays["key"] + mx.array([0, 0, first_row], mx.uint32)}
                    counted = weights if lane == 0 else {**weights, "micro_batch": mx.array(0.0)}
                    mx.eval(part)
                    with mx.stream(self._streams[lane]):
                        carry, places = self._accumulate_lane(self._params, part, counted)
                    carries.append(carry)
                    under_way.append(self._pool.submit(_evaluate, carry, places, pace))
                    first_row += part["input_ids"].shape[0]
            except BaseException:
                pace.abort()
                raise
            finally:
                wait(under_way)
        for lane in under_way:
            lane.result()
        return carries


def _evaluate(carry: Any, places: list[mx.array], pace: Barrier) -> None:
    """Evaluate what a lane makes, at most a part of the model ahead of the other lanes.

    MLX lets ten tasks of ten operations wait, of all streams together (``scheduler::wait_for_one``, mlx 0.32.4): a lane
    that has filled them with large operations would let the others run dry.
    """
    try:
        while places:
            mx.async_eval(places.pop(0))
            pace.wait()
    except BrokenBarrierError:
        pass  # Another lane has none left, or failed.
    finally:
        pace.abort()
    mx.eval(carry)


@cache
def _stream(lane: int) -> mx.Stream:
    """A stream for graphs that this thread makes and another evaluates, which MLX's plain ones do not allow."""
    return mx.new_thread_unsafe_stream(mx.cpu)


def count_lanes() -> int:
    """Cores that a step may spread over: on the Linux CPU those that OpenBLAS uses, elsewhere one.

    ``OPENBLAS_NUM_THREADS`` and ``OMP_NUM_THREADS`` limit them, as they limit OpenBLAS.
    """
    if sys.platform != "linux" or not on_cpu() or mx.cuda.is_available():
        return 1
    return blas_threads() or len(os.sched_getaffinity(0))


def start_threads(count: int) -> ThreadPoolExecutor | None:
    """A pool whose threads all run, so that none is missing in the middle of a step; None where the system has none."""
    pool, barrier = ThreadPoolExecutor(count, thread_name_prefix="lane"), Barrier(count)
    try:
        for _ in range(count):
            # Each waits for the others, so each takes a thread of its own.
            pool.submit(barrier.wait)
    except RuntimeError:
        barrier.abort()
        pool.shutdown(wait=False, cancel_futures=True)
        return None
    return pool


def make_step(objective: Objective, optimizer: Optimizer, clip: GradClip, **options: Any) -> Step:
    """The step for this device, in lanes where there is more than one core for them.

    What looks at a micro-batch as one, such as experts that are balanced over it, keeps it whole.
    """
    lanes = count_lanes()
    exchange = options.get("exchange")
    if lanes == 1 or objective.whole or (exchange is not None and exchange.in_model):
        return Step(objective, optimizer, clip, **options)
    pool = start_threads(lanes)
    if pool is None:
        return Step(objective, optimizer, clip, **options)
    return LanedStep(objective, optimizer, clip, pool=pool, lanes=lanes, **options)
