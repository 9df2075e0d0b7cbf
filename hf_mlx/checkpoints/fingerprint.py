"""A few numbers of the frozen base, by which a checkpoint knows the model it was trained on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..errors import CheckpointError
from ..models.load import LoadedModel

_TENSORS = 16
_VALUES = 16


def take_fingerprint(loaded: LoadedModel, trained: Iterable[str]) -> dict[str, Any]:
    """Model type, and the first values of some frozen arrays spread over the model, as float32.

    Args:
        loaded: The model.
        trained: MLX names of what the run changes, left out.
    """
    return read_samples(loaded, choose_samples(loaded, trained))


def choose_samples(loaded: LoadedModel, trained: Iterable[str]) -> dict[str, mx.array]:
    """The arrays that :func:`take_fingerprint` samples, by MLX name; none is evaluated."""
    trained = set(trained)
    held: dict[str, mx.array] = dict(tree_flatten(loaded.model.parameters()))
    frozen = [(name, value) for name, value in held.items() if name not in trained]
    chosen = frozen[:: max(len(frozen) // _TENSORS, 1)]
    return dict(chosen)


def read_samples(loaded: LoadedModel, chosen: dict[str, mx.array]) -> dict[str, Any]:
    """The fingerprint of a model by ``chosen``, which is emptied.

    The model may hold parts of these arrays, which are read as well: no array has to stay for its part's sake.
    """
    made: dict[str, Any] = {"model_type": loaded.model_type, "dtypes": {}, "samples": {}}
    held: dict[str, mx.array] = dict(tree_flatten(loaded.model.parameters()))
    for name in list(chosen):
        value = chosen.pop(name)
        made["dtypes"][name] = str(value.dtype)
        made["samples"][name] = value.reshape(-1)[-_VALUES:].astype(mx.float32).tolist()
        mx.eval(held[name])
    return made


def compare_fingerprints(
    recorded: dict[str, Any], current: dict[str, Any], folder: Path, base: Path, replaced: Iterable[str] = ()
) -> None:
    """Raise when a checkpoint was trained on another base than the one at hand.

    Arrays among ``replaced`` are the checkpoint's own, so their values do not matter.

    Raises:
        CheckpointError: With the first array that differs.
    """
    what = None
    if recorded["model_type"] != current["model_type"]:
        what = f"model type {recorded['model_type']!r}"
    elif recorded["dtypes"] != current["dtypes"]:
        changed = {n for n, t in recorded["dtypes"].items() if current["dtypes"].get(n) != t}
        name = min(changed, default="")
        what = f"{name} in {recorded['dtypes'].get(name)}" if name else "fewer weights"
    else:
        own = set(replaced)
        compared = {n: values for n, values in recorded["samples"].items() if n not in own}
        different = [n for n, values in compared.items() if values != current["samples"][n]]
        what = f"other values in {different[0]}" if different else None
    if what:
        raise CheckpointError(
            f"{folder}: trained on another base than {base}: {what}",
            "the base model, dtype and quantisation that the adapter was trained on",
            "the model= and the dtype of that run; to go on from the adapter on another base begin a new run",
        )
