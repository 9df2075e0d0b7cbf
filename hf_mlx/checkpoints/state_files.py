"""A state of the run in a checkpoint folder: torch's file where torch is installed, safetensors and JSON elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx

from ..intake import lies
from .damage import FILES
from .torch_files import has_torch, load_torch, save_torch
from .trees import read_tree, write_tree

# What is stored, and torch's name for it.
OPTIMIZER, SCHEDULER, RANDOM = "optimizer", "scheduler", "rng_state"
TORCH_NAMES = {OPTIMIZER: "optimizer.pt", SCHEDULER: "scheduler.pt", RANDOM: "rng_state.pth"}


def random_kind(rank: int, processes: int) -> str:
    """What the random states of a process are stored as: of several each has its own."""
    return RANDOM if processes == 1 else f"{RANDOM}_{rank}"


def torch_name(kind: str) -> str:
    """Torch's name for what is stored as ``kind``."""
    return TORCH_NAMES.get(kind, f"{kind}.pth")


def write_state(tree: Any, folder: Path, kind: str, *, torch: bool | None = None) -> None:
    """Write one state.

    Args:
        tree: As torch would save it, arrays as ``mx.array``.
        folder: Where to write.
        kind: One of :data:`TORCH_NAMES`, or of :func:`random_kind`.
        torch: True writes torch's file, False safetensors and JSON, None what can be written.
    """
    if has_torch() if torch is None else torch:
        save_torch(tree, folder / torch_name(kind))
    else:
        write_tree(tree, folder, kind)


def has_state(folder: Path, kind: str) -> bool:
    """Whether the state is there, in either form."""
    return lies(folder / torch_name(kind)) or lies(folder / f"{kind}.json")


def read_state(folder: Path, kind: str) -> Any:
    """Read a state that is there, in the form it is in.

    Raises:
        CheckpointError: It is cut short or edited.
        MissingDependency: Only torch can read it, and torch is not installed.
    """
    in_torch = lies(folder / torch_name(kind))
    path = folder / (torch_name(kind) if in_torch else f"{kind}.json")
    tree = load_torch(path, random_states=kind.startswith(RANDOM)) if in_torch else read_tree(folder, kind)
    if not _is_finite(tree):
        raise FILES.refuse(path, "NaN or infinite values", "finite values")
    return tree


def _is_finite(tree: Any) -> bool:
    if isinstance(tree, mx.array):
        return not mx.issubdtype(tree.dtype, mx.floating) or bool(mx.isfinite(tree).all().item())
    values = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return all(_is_finite(value) for value in values)


def state_files(kind: str) -> tuple[str, ...]:
    """Every file name that the state may have."""
    return torch_name(kind), f"{kind}.json", f"{kind}.safetensors"
