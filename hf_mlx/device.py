"""The device that MLX computes on."""

from __future__ import annotations

from typing import Any

import mlx.core as mx


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
