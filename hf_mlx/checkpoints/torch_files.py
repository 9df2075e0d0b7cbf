"""torch's own files, where torch is installed: written for TRL, read without running any code in them."""

from __future__ import annotations

import copy
import importlib.util
import zipfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import CheckpointError, MissingDependency


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
    import torch

    check_archive(path)
    try:
        with _random_types() if random_states else nullcontext():
            return _from_torch(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        # Whatever a broken or hostile pickle raises, the answer is the same.
        raise _broken(path, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error


def check_archive(path: Path) -> None:
    """Prove the checksums inside a torch file, a zip archive; torch itself does not look at them.

    Raises:
        CheckpointError: A member does not match its checksum, or the file is not an archive.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
    except (OSError, zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        raise _broken(path, str(error)) from error
    if wrong is not None:
        raise _broken(path, f"{wrong} does not match its checksum")


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


def _broken(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {what}",
        "a complete file that torch.save wrote",
        "resume from another checkpoint: trainer.train(resume_from_checkpoint=True) takes the newest complete one",
    )
