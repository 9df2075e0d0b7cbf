"""How far MLX works ahead of itself, which sets the peak memory of a step.

MLX orders a graph depth-first, but up to MLX_BFS_MAX_WIDTH operations wide: a wider front begins more than it ends.
On CUDA, temporaries live until the command buffer that uses them has run, and ten buffers may wait, so their size is
memory too. Metal's own buffers are small.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from ..device import on_cuda
from ..settings.plan import TrainPlan

WIDTH = "MLX_BFS_MAX_WIDTH"
BUFFERS = ("MLX_MAX_OPS_PER_BUFFER", "MLX_MAX_MB_PER_BUFFER")
# MiB of arrays in a buffer, measured in docs/performance.md: for micro-batches of 8,192 tokens and more, in proportion
# for smaller ones, and the least.
MEGABYTES, TOKENS = 400, 8192
LEAST_MEGABYTES = 100
MEGABYTES_CHECKPOINTED = 20


def limit_pending_work(plan: TrainPlan) -> dict[str, str]:
    """Make MLX end, and free, what it has begun before it begins more.

    MLX reads the limits once, at the first evaluation of a process and when its device starts: nothing changes where
    MLX has been used already. The environment is left as it was, and a limit that the user has set stays.

    Args:
        plan: A run that recomputes its activations asked for less memory, and gets smaller buffers.

    Returns:
        The variables that MLX was given.
    """
    limits = {} if WIDTH in os.environ else {WIDTH: "1"}
    if not plan.use_cpu and mx.cuda.is_available() and not any(name in os.environ for name in BUFFERS):
        limits[BUFFERS[1]] = str(_choose_megabytes(plan))
    os.environ.update(limits)
    try:
        mx.eval(mx.zeros(1) + 1)
    finally:
        for name in limits:
            del os.environ[name]
    return limits


def _choose_megabytes(plan: TrainPlan) -> int:
    if plan.checkpointing.enabled:
        return MEGABYTES_CHECKPOINTED
    if plan.data.max_length is None:
        return MEGABYTES
    tokens = plan.batch.train_batch_size * plan.data.max_length
    return min(max(MEGABYTES * tokens // TOKENS, LEAST_MEGABYTES), MEGABYTES)


@contextmanager
def wait_for_memory(plan: TrainPlan, need: Callable[[], int], backend: Any = mx) -> Iterator[None]:
    """On CUDA, a run with checkpointing waits for pending work rather than take more memory than its steps need.

    MLX goes over its limit where it must: a ``need`` that is too low costs time, never an error. The earlier limit is
    put back.

    Args:
        plan: Without checkpointing nothing is done.
        need: Bytes of a step; called only where the limit is set.
        backend: ``mlx.core``.
    """
    if not (plan.checkpointing.enabled and on_cuda(backend)):
        yield
        return
    earlier = backend.get_memory_limit()
    backend.set_memory_limit(min(need(), earlier))
    try:
        yield
    finally:
        backend.set_memory_limit(earlier)
