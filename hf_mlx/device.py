"""The device that MLX computes on."""

from __future__ import annotations

import os
from typing import Any

import mlx.core as mx
import numpy as np

#: How many operations wide MLX works on a graph.
WIDTH = "MLX_BFS_MAX_WIDTH"
#: How large a command buffer grows, in operations and in MiB.
BUFFERS = ("MLX_MAX_OPS_PER_BUFFER", "MLX_MAX_MB_PER_BUFFER")
#: MiB of arrays in a buffer where nothing is known of the run, measured in docs/performance.md.
MEGABYTES = 400
#: Numbers of the largest table that is read in pairs: each pair costs an operation.
MOST_IN_PAIRS = 512


def on_cpu() -> bool:
    """Whether MLX computes on the CPU."""
    return mx.default_device().type == mx.cpu


def on_cuda(backend: Any = mx) -> bool:
    """Whether MLX computes on a CUDA device.

    Args:
        backend: ``mlx.core``.
    """
    return backend.cuda.is_available() and backend.default_device() == backend.gpu


def on_metal(backend: Any = mx) -> bool:
    """Whether MLX computes on a Mac's GPU.

    Args:
        backend: ``mlx.core``.
    """
    return backend.metal.is_available() and backend.default_device() == backend.gpu


def start_depth_first(megabytes: int | None) -> dict[str, str]:
    """Make MLX end, and free, what it has begun before it begins more.

    MLX reads these limits once, at the first evaluation of a process and when its device starts: nothing changes where
    MLX has been used already. The environment is left as it was, and a limit that the user has set stays.

    Args:
        megabytes: MiB of arrays in a command buffer of a CUDA device; None leaves MLX's own.

    Returns:
        The variables that MLX was given.
    """
    limits = {} if WIDTH in os.environ else {WIDTH: "1"}
    if megabytes is not None and mx.cuda.is_available() and not any(name in os.environ for name in BUFFERS):
        limits[BUFFERS[1]] = str(megabytes)
    os.environ.update(limits)
    try:
        mx.eval(mx.zeros(1) + 1)
    finally:
        for name in limits:
            del os.environ[name]
    return limits


class Coming:
    """A small array of int32 on its way to the host, an even number of them.

    On CUDA the host reads numbers of 8 bytes and less where they are, and copies anything longer, which waits for all
    that the device has to do (mlx 0.32.4): a table is read in pairs.

    Args:
        array: What is computed.
    """

    def __init__(self, array: mx.array) -> None:
        self._shape = array.shape
        self._parts = [array]
        if on_cuda() and array.size <= MOST_IN_PAIRS:
            pairs = array.reshape(-1).view(mx.int64)
            # A sum has memory of its own; a view would be read with all that it is a part of.
            self._parts = [pairs[place] + 0 for place in range(pairs.size)]
        mx.async_eval(self._parts)

    def read(self) -> np.ndarray:
        """The array, once it is there."""
        if self._parts[0].ndim:
            return np.array(self._parts[0])
        return np.array([part.item() for part in self._parts], np.int64).view(np.int32).reshape(self._shape)
