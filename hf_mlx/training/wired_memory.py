"""Memory that macOS keeps resident while a run is under way, and how much of it is spare."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from ..backends import WIRES, macos_version
from ..device import on_metal
from .memory import ACCURACY


@contextmanager
def wired_memory(backend: Any = mx) -> Iterator[None]:
    """On Metal, from macOS 15 on, let MLX wire all that the device recommends, and put the earlier limit back.

    Source: mlx-lm 0.32.2 ``tuner.trainer.train`` and ``generate.wired_limit``.

    Args:
        backend: ``mlx.core``.
    """
    version = macos_version()
    wires = on_metal(backend) and (version is None or version >= WIRES)
    recommended = backend.device_info().get("max_recommended_working_set_size") if wires else None
    if recommended is None:
        yield
        return
    earlier = backend.set_wired_limit(recommended)
    try:
        yield
    finally:
        try:
            # The limit must not change under work that is still going on.
            backend.synchronize()
        finally:
            backend.set_wired_limit(earlier)


@contextmanager
def bounded_cache(need: Callable[[], int], backend: Any = mx) -> Iterator[None]:
    """On Metal, let MLX keep no more freed memory than one step takes, and put the earlier limit back.

    MLX keeps what is freed for arrays of the same size, up to the working set, and wired (mlx pull request 2006): with
    rows of many lengths that takes the memory of every other program, and no peak shows it. What a step needs is found
    again at the next one; mlx-lm 0.32.2's ``tuner.trainer`` empties the cache at every step.

    Args:
        need: Bytes that a step takes and gives back; called only where the limit is set.
        backend: ``mlx.core``.
    """
    if not on_metal(backend):
        yield
        return
    limit = int(need() * ACCURACY)
    earlier = backend.set_cache_limit(limit)
    if earlier < limit:
        backend.set_cache_limit(earlier)
    try:
        yield
    finally:
        backend.set_cache_limit(earlier)
