"""The trained weights of a checkpoint folder, checked against the model that is to go on with them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..adapters.adapter import Adapter
from ..adapters.config import config_to_json
from ..adapters.slots import Slot
from ..adapters.vocabulary import carried_slots, read_carried
from ..errors import CheckpointError, ModelError
from ..intake import lies
from ..models.load import LoadedModel
from ..models.weights import inspect_checkpoint, read_header
from .damage import FILES
from .inspection import ADAPTER, ADAPTER_CONFIG
from .parameters import Parameters
from .trees import load_arrays

# Keys of adapter_config.json that change what the same tensors compute.
_MEANING = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "bias", "lora_bias")


def load_weights(
    folder: Path, params: Mapping[str, mx.array], parameters: Parameters, adapter: Adapter | None, loaded: LoadedModel
) -> tuple[dict[str, mx.array], dict[str, mx.array]]:
    """The trained arrays by MLX name, evaluated, in the dtypes of ``params``, and frozen ones that travel with them.

    Args:
        folder: The checkpoint.
        params: What the run trains now, for names, shapes and dtypes.
        parameters: Their names and layouts in torch.
        adapter: The run's adapter, or None when all weights are trained.
        loaded: The model.

    Returns:
        The trained arrays, and those of embedding and head that PEFT saves beside an adapter, as stored: a script that
        resized its model may have drawn other new rows this time, and upstream goes on with the checkpoint's.

    Raises:
        CheckpointError: Weights of another model, or of another adapter.
    """
    kind = "an adapter" if lies(folder / ADAPTER) else "a whole model"
    if lies(folder / ADAPTER) != (adapter is not None):
        raise CheckpointError(
            f"{folder}: {kind}",
            "an adapter, as peft_config is given" if adapter else "a whole model, as no peft_config is given",
            "MLXSFTTrainer(..., peft_config=None)" if adapter else "MLXSFTTrainer(..., peft_config=LoraConfig(...))",
        )
    try:
        files = [ADAPTER] if adapter else list(inspect_checkpoint(folder).files)
        shapes = {name: tuple(e["shape"]) for file in files for name, e in read_header(folder / file)[0].items()}
    except ModelError as error:
        raise CheckpointError(error.received, error.required, error.remedy) from error
    if adapter is not None:
        _compare_adapters(folder, adapter)
    idle = adapter.idle if adapter else {}
    expected = {name: tuple(value.shape) for name, value in (parameters.to_hf(params) | idle).items()}
    carried = carried_slots(loaded, adapter.blueprint) if adapter else {}
    _compare_shapes(folder, shapes, expected, carried, allowed=frozenset() if adapter else loaded.names.stored)
    tensors: dict[str, mx.array] = {}
    for file in files:
        tensors |= load_arrays(folder / file)
    values = parameters.from_hf({name: tensors[name] for name in expected})
    weights = {name: values[name].astype(value.dtype) for name, value in params.items()}
    frozen = read_carried(loaded, carried, tensors)
    idle.update({name: tensors[name].astype(value.dtype) for name, value in idle.items()})
    # The file may be replaced or deleted while the run goes on.
    mx.eval(weights, frozen, idle)
    for name, value in (weights | frozen).items():
        if not mx.isfinite(value).all().item():
            raise FILES.refuse(folder, f"{name} holds NaN or infinite values", "finite weights")
    return weights, frozen


def _compare_shapes(
    folder: Path,
    found: Mapping[str, tuple],
    trained: Mapping[str, tuple],
    carried: Mapping[str, Slot],
    *,
    allowed: frozenset[str],
) -> None:
    expected = {name: slot.shape for name, slot in carried.items()} | dict(trained)
    missing = sorted(set(trained) - set(found))
    extra = sorted(set(found) - set(expected) - allowed)
    wrong = sorted(name for name in set(found) & set(expected) if found[name] != expected[name])
    if not (missing or extra or wrong):
        return
    if wrong:
        what = f"{wrong[0]} of shape {found[wrong[0]]} where this run has {expected[wrong[0]]}"
    else:
        what = f"no {missing[0]}" if missing else f"{extra[0]}, which this run does not have"
    raise CheckpointError(
        f"{folder}: the weights of another model or adapter: {what} ({len(missing) + len(extra) + len(wrong)} differ)",
        "exactly the weights that this run trains",
        "the model and the peft_config that the checkpoint was written with",
    )


def _compare_adapters(folder: Path, adapter: Adapter) -> None:
    theirs = FILES.read_json(folder / ADAPTER_CONFIG)
    ours: dict[str, Any] = config_to_json(adapter, "", None)
    for key in _MEANING:
        if key in theirs and theirs[key] != ours[key]:
            raise CheckpointError(
                f"{folder}: an adapter with {key}={theirs[key]!r}",
                f"the adapter of this run, with {key}={ours[key]!r}",
                f"LoraConfig({key}={theirs[key]!r}, ...), or a new run without resume_from_checkpoint",
            )
