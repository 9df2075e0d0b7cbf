"""torch's own files, where torch is installed: written for TRL, read without running any code in them."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import MissingDependency
from ..models.pickles import load_pickle
from .damage import FILES


def has_torch() -> bool:
    """Whether torch can be imported."""
    return importlib.util.find_spec("torch") is not None


def require_torch(what: str) -> None:
    """Raise unless torch is installed.

    Raises:
        MissingDependency: It is not.
    """
    if not has_torch():
        raise MissingDependency(
            f"{what} without torch", "torch, which reads and writes its files", 'pip install "hf-mlx[hf]"'
        )


def save_torch(tree: Any, path: Path) -> None:
    """``torch.save`` of ``tree`` with every ``mx.array`` as a CPU tensor of the same bits."""
    import torch

    torch.save(_to_torch(tree), path)


def pickle_object(value: Any, path: Path) -> None:
    """``torch.save`` of a Python object: ``training_args.bin``, which is shared, so without the hub's token."""
    import torch

    if getattr(value, "hub_token", None):
        value = copy.copy(value)
        value.hub_token = None
    if "main_process_first" in getattr(value, "__dict__", ()):
        # How the processes of this run wait for each other is nothing to whoever reads the file.
        value = copy.copy(value)
        del value.main_process_first
    torch.save(value, path)


def load_torch(path: Path, *, random_states: bool = False) -> Any:
    """``torch.load(weights_only=True)`` with every tensor as an ``mx.array``.

    Args:
        path: The file.
        random_states: Also allow the numpy types that ``rng_state.pth`` holds.

    Raises:
        MissingDependency: torch is not installed.
        CheckpointError: The file is cut short or edited, or holds objects.
    """
    if not has_torch():
        raise MissingDependency(
            f"{path}, a file of torch's, without torch",
            "torch, or the same state as safetensors and JSON",
            f'pip install "hf-mlx[hf]", or where torch is installed: hf-mlx checkpoint from-torch {path.parent}',
        )
    with FILES.understood(path, "a complete file that torch.save wrote"):
        return _from_torch(load_pickle(path, FILES, allowed=_random_types() if random_states else None))


def _random_types() -> Any:
    from transformers.trainer_pt_utils import safe_globals

    return safe_globals()


def _to_torch(value: Any) -> Any:
    import torch

    if isinstance(value, mx.array):
        if value.dtype == mx.bfloat16:
            return torch.from_numpy(np.array(value.view(mx.uint16))).view(torch.bfloat16)
        return torch.from_numpy(np.array(value))
    if isinstance(value, dict):
        return {key: _to_torch(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_to_torch(item) for item in value)
    return value


def _from_torch(value: Any) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        if value.dtype == torch.bfloat16:
            return mx.array(np.array(value.contiguous().view(torch.uint16).numpy())).view(mx.bfloat16)
        if value.dtype == torch.float64:
            raise TypeError("a float64 tensor")
        return mx.array(np.array(value.numpy()))
    if isinstance(value, dict):
        return {key: _from_torch(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_from_torch(item) for item in value)
    return value
