"""What a computation holds at its peak, whatever the timing of MLX's threads."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx

#: When a buffer is freed still depends on threads, by an array or two.
RUNS = 8


def peak_of(run: Callable[[], Any]) -> int:
    """Bytes that ``run`` takes at its peak beside what was there: the least of several runs after a first.

    With a memory limit of zero MLX allocates nothing ahead of what has run. Without it, the thread that orders a graph
    runs ahead of the thread that computes it, by as much as other processes leave it.
    """
    mx.eval(run())
    mx.synchronize()
    mx.clear_cache()
    limit = mx.set_memory_limit(0)
    peaks = []
    try:
        for _ in range(RUNS):
            mx.reset_peak_memory()
            before = mx.get_active_memory()
            mx.eval(run())
            mx.synchronize()
            peaks.append(mx.get_peak_memory() - before)
    finally:
        mx.set_memory_limit(limit)
    return min(peaks)
