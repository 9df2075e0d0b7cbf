"""Torch tensors and numpy arrays of all processes, as ``accelerate.Accelerator`` gathers them."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import SettingError
from ..models.torch_arrays import to_numpy
from ..processes.world import World


def gather(value: Any, world: World) -> Any:
    """The arrays of all processes, concatenated along their first dimension; scalars become one dimension.

    Args:
        value: A tensor or array, or lists, tuples and dicts of them, alike on all processes.
        world: The processes; one process gets ``value`` back.
    """
    return value if world.is_alone else _map(value, lambda array: np.concatenate(_exchange(array, world)))


def cut(value: Any, rows: int) -> Any:
    """The first ``rows`` of gathered arrays."""
    return _map(value, lambda array: array[:rows])


def reduce(value: Any, world: World, reduction: str, scale: float) -> Any:
    """The sum or the mean over all processes, times ``scale``.

    Raises:
        SettingError: Another reduction.
    """
    if world.is_alone:
        return value
    if reduction not in ("sum", "mean", "none"):
        raise SettingError(
            f"accelerator.reduce(reduction={reduction!r})", "is one of sum, mean, none", 'reduction="sum"'
        )

    def combine(array: np.ndarray) -> np.ndarray:
        total = np.sum(_exchange(array, world), axis=0, dtype=array.dtype).reshape(array.shape)
        return (total / world.size if reduction == "mean" else total) * (scale if scale != 1.0 else 1)

    return value if reduction == "none" else _map(value, combine)


def pad(value: Any, world: World, dim: int, pad_index: int, pad_first: bool) -> Any:
    """``value`` as long along ``dim`` as the longest of all processes."""
    if world.is_alone:
        return value

    def widen(array: np.ndarray) -> np.ndarray:
        if dim >= array.ndim:
            return array
        longest = int(world.gather("pad_across_processes", np.array([array.shape[dim]])).max())
        missing = longest - array.shape[dim]
        ends = [(0, 0)] * array.ndim
        ends[dim] = (missing, 0) if pad_first else (0, missing)
        return np.pad(array, ends, constant_values=pad_index)

    return _map(value, widen)


def _exchange(array: np.ndarray, world: World) -> list[np.ndarray]:
    buffer = io.BytesIO()
    np.save(buffer, np.atleast_1d(array))
    return [np.load(io.BytesIO(data)) for data in world.gather_bytes(buffer.getvalue(), "accelerator.gather")]


def _map(value: Any, function: Any) -> Any:
    if isinstance(value, Mapping):
        return type(value)({key: _map(item, function) for key, item in value.items()})  # pyright: ignore[reportCallIssue]
    if isinstance(value, (list, tuple)):
        return type(value)(_map(item, function) for item in value)
    made = function(to_numpy(value))
    if type(value).__module__.partition(".")[0] != "torch":
        return made
    import torch

    return torch.from_numpy(np.ascontiguousarray(made)).to(value.dtype)
