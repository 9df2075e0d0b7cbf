"""How far MLX works ahead of itself, which sets the peak memory of a step.

MLX orders a graph depth-first, but up to MLX_BFS_MAX_WIDTH operations wide: a wider front begins more than it ends.
On CUDA, temporaries live until the command buffer that uses them has run, and ten buffers may wait, so their size is
memory too. Metal's own buffers are small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from ..device import MEGABYTES, on_cuda, start_depth_first
from ..settings.plan import PairLossPlan, ScoreLossPlan, TrainPlan

# Of MEGABYTES for micro-batches of 8,192 tokens and more, in proportion for smaller ones, and the least.
TOKENS = 8192
LEAST_MEGABYTES = 100
MEGABYTES_CHECKPOINTED = 40


def limit_pending_work(plan: TrainPlan) -> dict[str, str]:
    """Start MLX, where it has not started yet, so that it works depth-first and in buffers that suit the run.

    Args:
        plan: A run that recomputes its activations asked for less memory, and gets smaller buffers.

    Returns:
        The variables that MLX was given.
    """
    return start_depth_first(None if plan.use_cpu else _choose_megabytes(plan))


def _choose_megabytes(plan: TrainPlan) -> int:
    if plan.checkpointing.enabled:
        return MEGABYTES_CHECKPOINTED
    if plan.data.max_length is None:
        return MEGABYTES
    texts = plan.batch.train_batch_size * (2 if isinstance(plan.loss, PairLossPlan | ScoreLossPlan) else 1)
    tokens = texts * plan.data.max_length
    megabytes = min(max(MEGABYTES * tokens // TOKENS, LEAST_MEGABYTES), MEGABYTES)
    # MLX counts numbers, and an update of float32 is of numbers twice as large.
    return megabytes // 2 if plan.lora is None and plan.model.precision.dtype == "float32" else megabytes


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
