"""An adapter folder as it lies on disk: its config and its tensors, proven before anything uses them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import AdapterError, MissingDependency, ModelError
from ..intake import Intake, Types, lies
from ..models.pickles import load_pickle
from ..models.weights import read_header

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PICKLE = "adapter_model.bin"
_FLOATS = ("F32", "F16", "BF16")
# Beside what LoraConfig holds.
_TYPES: dict[str, Types] = {"base_model_name_or_path": (str, None), "revision": (str, None), "peft_type": (str, None)}
FILES = Intake(AdapterError, "fetch the adapter again, or save it again: model.save_pretrained(folder)")


def read_config_file(folder: Path) -> dict[str, Any]:
    """adapter_config.json as a dict.

    Raises:
        AdapterError: It is absent, too large, leaves the folder or is not a JSON object.
    """
    if not folder.is_dir():
        raise AdapterError(
            f"adapter folder {folder}: no such folder",
            f"a folder with {CONFIG} and {WEIGHTS}",
            'download it first: hf download OWNER/ADAPTER --local-dir FOLDER; import_adapter("FOLDER", model)',
        )
    path = inside(folder, CONFIG)
    if not lies(path):
        named = sorted(str(path.parent) for path in folder.glob(f"*/{CONFIG}"))
        raise AdapterError(
            f"{folder}: no {CONFIG}",
            "a folder that PEFT's save_pretrained wrote",
            # PEFT puts an adapter that is not called "default" into a folder of its name.
            f"give the adapter's folder itself{f': {named[0]}' if named else ''}",
        )
    return FILES.read_json(path, _TYPES, finite=True, largest=1 << 53)


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Key → shape of every tensor in the folder's safetensors, from its checked header.

    Raises:
        AdapterError: No weights, a file that is cut short or edited, or a dtype that is no float.
    """
    path = inside(folder, WEIGHTS)
    if not lies(path):
        raise _no_weights(folder)
    try:
        header, _ = read_header(path)
    except ModelError as error:
        raise AdapterError(error.received, error.required, FILES.remedy) from error
    for key, entry in header.items():
        if entry["dtype"] not in _FLOATS:
            raise AdapterError(
                f"{path}: {key} of dtype {entry['dtype']}",
                f"one of {', '.join(_FLOATS)}",
                "save the adapter in floating point: model.save_pretrained(dir)",
            )
    return {key: tuple(entry["shape"]) for key, entry in header.items()}


def read_tensors(folder: Path) -> dict[str, mx.array]:
    """Every tensor of the folder, evaluated, so that the file may be replaced afterwards.

    Raises:
        AdapterError: A value is NaN or infinite.
    """
    tensors: dict[str, mx.array] = dict(mx.load(str(inside(folder, WEIGHTS))))  # pyright: ignore
    check_finite(tensors, str(folder / WEIGHTS))
    return tensors


def has_pickle_only(folder: Path) -> bool:
    """Whether the weights are only there as ``adapter_model.bin``."""
    return not lies(folder / WEIGHTS) and lies(folder / PICKLE)


def read_pickle(folder: Path) -> dict[str, mx.array]:
    """The tensors of adapter_model.bin, through torch's ``weights_only`` unpickler, which runs no code.

    Raises:
        AdapterError: The file holds anything but float tensors.
        MissingDependency: torch is not installed.
    """
    path = inside(folder, PICKLE)
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise MissingDependency(
            f"{path}, a pickle, without torch",
            f"{WEIGHTS}, or torch to read the pickle safely",
            'pip install "hf-mlx[hf]", or convert it where torch is: model.save_pretrained(dir)',
        ) from error
    with FILES.understood(path, f"{WEIGHTS}, or a pickle of tensors and nothing else"):
        held = load_pickle(path, FILES)
        tensors = {str(key): _from_torch(value) for key, value in held.items()}
    check_finite(tensors, str(path))
    return tensors


def check_finite(tensors: dict[str, mx.array], source: str) -> None:
    """Evaluate the tensors and refuse NaN and infinite values by key."""
    mx.eval(tensors)
    for key, value in tensors.items():
        if not mx.isfinite(value).all().item():
            raise AdapterError(
                f"{source}: {key} holds NaN or infinite values",
                "finite weights",
                "take an earlier checkpoint of that run; its loss became NaN before this one was saved",
            )


def _from_torch(value: Any) -> mx.array:
    if not value.is_floating_point():
        raise TypeError(f"dtype {value.dtype}")
    # numpy has no bfloat16; fp32 holds every value of it.
    return mx.array(np.array(value.detach().float().numpy()))


def inside(folder: Path, name: str) -> Path:
    """``folder/name``, refused when a link leads out of the folder (the hub cache's own blobs excepted)."""
    path = folder / name
    try:
        target, home = path.resolve(), folder.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: Python 3.11 and 3.12, a link in a circle
        raise FILES.refuse(path, "a link that leads in a circle") from error
    allowed = [home]
    if re.fullmatch(r"models--[^/]+", home.parent.parent.name) and home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if not any(target.is_relative_to(root) for root in allowed):
        raise AdapterError(
            f"{path}, a link to {target}", f"a file inside {folder}", f"copy it there: cp --dereference {path} ..."
        )
    return path


def _no_weights(folder: Path) -> AdapterError:
    foreign = sorted(p.name for p in folder.glob("adapters.safetensors"))
    if foreign:
        return AdapterError(
            f"{folder}: {foreign[0]}, an adapter in mlx-lm's own format",
            f"{WEIGHTS}, as PEFT writes it",
            f"hf-mlx export {folder} OUTPUT --base OWNER/MODEL, which writes it as PEFT does",
        )
    return AdapterError(
        f"{folder}: no {WEIGHTS}", "the weights beside the config", "fetch the whole adapter folder again"
    )
