"""Memory that macOS keeps resident while a run is under way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from ..backends import WIRES, macos_version
from ..device import on_metal


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
