"""Arrays between torch, MLX and numpy. torch is imported by the functions that need it."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import mlx.core as mx
import numpy as np


def to_mlx(tensor: Any) -> mx.array:
    """A torch tensor on any device as an MLX array of the same dtype; a copy."""
    import torch

    tensor = tensor.detach().to("cpu").contiguous()
    if tensor.dtype == torch.bfloat16:
        # numpy has no bfloat16; the bits travel as integers.
        return mx.array(tensor.view(torch.int16).numpy()).view(mx.bfloat16)
    return mx.array(tensor.numpy())


def to_torch(array: mx.array) -> Any:
    """An MLX array as a torch tensor on the CPU, same dtype; a copy."""
    import torch

    if array.dtype == mx.bfloat16:
        return torch.from_numpy(np.array(mx.contiguous(array).view(mx.int16))).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def to_parameter(array: mx.array, *, trainable: bool) -> Any:
    """A copy as a ``torch.nn.Parameter`` where torch is installed, else the array itself."""
    if find_spec("torch") is None:
        return array
    import torch

    return torch.nn.Parameter(to_torch(array), requires_grad=trainable)


def like_torch(array: np.ndarray) -> Any:
    """A torch tensor that shares the array's memory where torch is installed, else the array."""
    if find_spec("torch") is None:
        return array
    import torch

    return torch.from_numpy(np.ascontiguousarray(array))


def to_numpy(value: Any) -> np.ndarray:
    """A numpy array of a torch tensor, an MLX array, or what numpy reads."""
    return value.detach().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)
