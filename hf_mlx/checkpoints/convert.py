"""A checkpoint's state between torch's files and safetensors with JSON, in place."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..intake import LARGE, lies
from ..models.config import read_config
from .damage import FILES
from .files import replaced_folder
from .inspection import ADAPTER_CONFIG, check_complete
from .lock import held
from .manifest import MANIFEST, write_manifest
from .parameters import build_live_model
from .state_files import TORCH_NAMES, has_state, read_state, state_files, write_state
from .torch_files import require_torch

# Weights and states, whose headers are checked against their sizes.
_LARGE = (".safetensors", ".pt", ".pth")
# Which of the names decay, given the names of LayerNorm modules.
Decayed = Callable[[Iterable[str], Iterable[str]], frozenset[str]]


def to_torch(folder: str | Path) -> list[str]:
    """Turn optimizer, scheduler and random states into the ``.pt`` files that TRL resumes from.

    Args:
        folder: A complete checkpoint; replaced as a whole.

    Returns:
        The names of the files written; none when they are all there already.

    Raises:
        CheckpointError: It is not complete, or torch has other parameters than the files.
        MissingDependency: torch is not installed.
    """
    return _convert(Path(folder), torch=True, rename=_name_to_id)


def from_torch(folder: str | Path, decayed: Decayed) -> list[str]:
    """Turn the ``.pt`` files into safetensors and JSON, which need no torch to resume from.

    Args:
        folder: A complete checkpoint, of this library or of transformers' trainer; replaced as a whole.
        decayed: Which parameters weight decay applies to: tells the numbers of a full fine-tune apart.

    Returns:
        The names of the files written; none when they are all there already.

    Raises:
        CheckpointError: It is not complete.
        MissingDependency: torch is not installed.
    """
    return _convert(Path(folder), torch=False, rename=lambda tree, folder: _id_to_name(tree, folder, decayed))


def _convert(folder: Path, *, torch: bool, rename: Callable[[Any, Path], Any]) -> list[str]:
    require_torch(f"hf-mlx checkpoint {'to' if torch else 'from'}-torch {folder}")
    folder = folder.absolute()
    check_complete(folder)
    kinds = [k for k in TORCH_NAMES if has_state(folder, k) and lies(folder / TORCH_NAMES[k]) != torch]
    if not kinds:
        return []
    states = {kind: read_state(folder, kind) for kind in kinds}
    if "optimizer" in states:
        with FILES.understood(folder, "the state of an optimizer in parameter groups"):
            states["optimizer"] = rename(states["optimizer"], folder)
    _check_others(folder, kinds)
    replaced = {name for kind in kinds for name in state_files(kind)} | {MANIFEST}
    with held(folder.parent), replaced_folder(folder) as temporary:
        for path in folder.iterdir():
            if path.name not in replaced:
                _copy(path, temporary / path.name)
        before = set(temporary.iterdir())
        for kind, tree in states.items():
            write_state(tree, temporary, kind, torch=torch)
        written = sorted(path.name for path in set(temporary.iterdir()) - before)
        write_manifest(temporary)
    return written


def _check_others(folder: Path, kinds: list[str]) -> None:
    """Prove that what is only copied can be: the states are read, and the weights' headers are."""
    read = {name for kind in kinds for name in state_files(kind)}
    for root, folders, names in os.walk(folder):
        for name in [name for name in folders if Path(root, name).is_symlink()] + names:
            if name not in read:
                FILES.check(Path(root, name), None if name.endswith(_LARGE) else LARGE)


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target)
        return
    try:
        os.link(source, target)
    except OSError:
        # Not every file system has hard links.
        shutil.copy2(source, target)


def _name_to_id(tree: dict[str, Any], folder: Path) -> dict[str, Any]:
    names = [key for group in tree["param_groups"] for key in group["params"]]
    if not names or not isinstance(names[0], str):
        return tree
    order = _live_names(folder)[0]
    if set(order) != set(names):
        raise CheckpointError(
            f"{folder}: the optimizer's state of {len(names)} tensors, but {len(order)} parameters in torch",
            "a model whose torch parameters are the tensors of its files",
            "go on with hf_mlx, or in TRL from the weights alone",
        )
    groups = [[name for name in order if name in set(group["params"])] for group in tree["param_groups"]]
    keys = {name: i for i, name in enumerate(name for group in groups for name in group)}
    return _renamed(tree, keys, groups)


def _id_to_name(tree: dict[str, Any], folder: Path, decayed: Decayed) -> dict[str, Any]:
    ids = [key for group in tree["param_groups"] for key in group["params"]]
    adapted = (folder / ADAPTER_CONFIG).is_file() or any(folder.glob(f"*/{ADAPTER_CONFIG}"))
    if adapted or not ids or isinstance(ids[0], str):
        # The order of an adapter is known without torch.
        return tree
    order, norms = _live_names(folder)
    decay = decayed(order, norms)
    names = [*(name for name in order if name in decay), *(name for name in order if name not in decay)]
    if len(names) != len(ids):
        raise CheckpointError(
            f"{folder}: the optimizer's state of {len(ids)} parameters, where the torch model has {len(names)}",
            "the state of all parameters of the model that lies beside it",
            "take another checkpoint of that run",
        )
    keys = dict(zip(ids, names, strict=True))
    return _renamed(tree, keys, [list(group["params"]) for group in tree["param_groups"]])


def _renamed(tree: dict[str, Any], keys: dict[Any, Any], groups: list[list[Any]]) -> dict[str, Any]:
    param_groups = [
        {**group, "params": [keys[key] for key in members]}
        for group, members in zip(tree["param_groups"], groups, strict=True)
    ]
    return {"state": {keys[key]: value for key, value in tree["state"].items()}, "param_groups": param_groups}


def _live_names(folder: Path) -> tuple[list[str], list[str]]:
    import torch

    model = build_live_model(read_config(folder))
    norms = [name for name, module in model.named_modules() if isinstance(module, torch.nn.LayerNorm)]
    return [name for name, _ in model.named_parameters()], norms
