"""Nested state as JSON for the shape and safetensors for the arrays: what torch.save holds, without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import ModelError
from ..intake import LARGE, lies
from ..models.weights import read_header
from .damage import FILES

_EXACT = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32")


def write_tree(tree: Any, folder: Path, stem: str) -> None:
    """Write ``{stem}.json`` and, where there are arrays, ``{stem}.safetensors``.

    Args:
        tree: Dicts, lists, tuples, ``mx.array``, ``np.ndarray`` and JSON's own values, nested at will.
        folder: Where to write.
        stem: File name without its ending.

    Raises:
        TypeError: Something else is in the tree.
    """
    arrays: dict[str, mx.array] = {}
    shape = _encode(tree, arrays, "")
    (folder / f"{stem}.json").write_text(json.dumps(shape, indent=1), encoding="utf-8")
    if arrays:
        mx.save_safetensors(str(folder / f"{stem}.safetensors"), arrays)


def read_tree(folder: Path, stem: str) -> Any:
    """Read what :func:`write_tree` wrote; types and bits are the same.

    Raises:
        CheckpointError: A file is not there, cut short or edited.
    """
    arrays: dict[str, mx.array] = {}
    described, stored = folder / f"{stem}.json", folder / f"{stem}.safetensors"
    with FILES.understood(described, "the files as they were written"):
        if lies(stored):
            try:
                read_header(stored)
            except ModelError as error:
                raise FILES.error(error.received, error.required, FILES.remedy) from error
            arrays = load_arrays(stored)
            mx.eval(arrays)
        return _decode(json.loads(FILES.read_text(described, LARGE)), arrays)


def load_arrays(path: Path) -> dict[str, mx.array]:
    """The tensors of a safetensors file, read when they are used."""
    arrays: Any = mx.load(str(path))
    return arrays


def _encode(value: Any, arrays: dict[str, mx.array], path: str) -> Any:
    if isinstance(value, (mx.array, np.ndarray)):
        kind = "array" if isinstance(value, mx.array) else "numpy"
        if isinstance(value, np.ndarray) and value.dtype.name not in _EXACT:
            raise TypeError(f"{path}: numpy array of {value.dtype.name}")
        key = path or "value"
        arrays[key] = value if isinstance(value, mx.array) else mx.array(value)
        return {f"${kind}": key}
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: _encode(item, arrays, _join(path, key)) for key, item in value.items()}
        return {"$dict": [[key, _encode(item, arrays, _join(path, key))] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [_encode(item, arrays, _join(path, i)) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{path}: {type(value).__name__}")


def _decode(value: Any, arrays: dict[str, mx.array]) -> Any:
    if isinstance(value, list):
        return [_decode(item, arrays) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"$array"}:
        return arrays[value["$array"]]
    if value.keys() == {"$numpy"}:
        return np.array(arrays[value["$numpy"]])
    if value.keys() == {"$tuple"}:
        return tuple(_decode(item, arrays) for item in value["$tuple"])
    if value.keys() == {"$dict"}:
        return {key: _decode(item, arrays) for key, item in value["$dict"]}
    return {key: _decode(item, arrays) for key, item in value.items()}


def _join(path: str, part: object) -> str:
    return f"{path}.{part}" if path else str(part)
