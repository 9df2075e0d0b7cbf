"""What a run trains, under the names and in the layouts and order of the torch model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import mlx.core as mx
from mlx.utils import tree_flatten

from ..adapters.adapter import PREFIX, Adapter
from ..adapters.slots import Slot, slots_of
from ..errors import CheckpointError, ModelError
from ..models.load import LoadedModel
from ..models.skeleton import build_skeleton
from .torch_files import has_torch

Arrays = Mapping[str, mx.array]


class Parameters(Protocol):
    """The trained parameters of a run, MLX ↔ torch."""

    def to_hf(self, arrays: Arrays) -> dict[str, mx.array]:
        """From MLX names to torch's names and layouts.

        Arrays have the parameters' own shapes; those of plain parameters may be reduced along an axis.
        """
        ...

    def from_hf(self, tensors: Arrays) -> dict[str, mx.array]:
        """The way back; tensors that are not trained are left out."""
        ...

    def is_plain(self, name: str) -> bool:
        """Whether the MLX parameter is one torch parameter in the same layout."""
        ...

    def owners(self) -> dict[str, str]:
        """Torch's name → MLX name, for every torch tensor that is trained."""
        ...

    def order(self) -> list[str] | None:
        """Torch's names in ``named_parameters()`` order; None when the torch model itself would have to say.

        Among them may be parameters that torch trains in name only, without an owner.
        """
        ...


class AdapterParameters:
    """The parameters of a LoRA adapter, as PEFT names them.

    Args:
        adapter: The adapter.
    """

    def __init__(self, adapter: Adapter) -> None:
        self._loaded = adapter.loaded
        trained = {path: i for i, path in enumerate(adapter.trainable())}
        slots = slots_of(adapter)
        names = [name for name, slot in slots.items() if slot.mlx_path in trained and not slot.base]
        self._slots = {name: slots[name] for name in sorted(names, key=lambda name: trained[slots[name].mlx_path])}
        self._order = _with_idle(adapter, list(self._slots))

    def to_hf(self, arrays: Arrays) -> dict[str, mx.array]:
        return {key: self._stored(slot, arrays) for key, slot in self._slots.items() if slot.mlx_path in arrays}

    def from_hf(self, tensors: Arrays) -> dict[str, mx.array]:
        values: dict[str, mx.array] = {}
        for key, slot in self._slots.items():
            if key not in tensors:
                continue
            if slot.as_stored and tensors[key].size == math.prod(slot.shape):
                values[slot.mlx_path] = _import(self._loaded, _plain(slot), tensors[key])
            else:
                values[slot.mlx_path] = tensors[key]
        return values

    def is_plain(self, name: str) -> bool:
        slots = [slot for slot in self._slots.values() if slot.mlx_path == name]
        return all(not slot.as_stored or _keeps_layout(self._loaded, _plain(slot), slot.shape) for slot in slots)

    def owners(self) -> dict[str, str]:
        return {name: slot.mlx_path for name, slot in self._slots.items()}

    def order(self) -> list[str]:
        return self._order

    def _stored(self, slot: Slot, arrays: Arrays) -> mx.array:
        value = arrays[slot.mlx_path]
        if slot.as_stored and value.size == math.prod(slot.shape):
            return next(iter(self._loaded.names.export_weights({_plain(slot): value}).values()))
        return value


class ModelParameters:
    """All weights of a model, as its Hugging Face checkpoint names them.

    Args:
        loaded: The model.
        names: MLX names of what is trained.
    """

    def __init__(self, loaded: LoadedModel, names: list[str]) -> None:
        self._loaded = loaded
        held = dict(tree_flatten(loaded.model.parameters()))
        self._shapes = {name: tuple(held[name].shape) for name in names}
        self._order: list[str] | None = None

    def to_hf(self, arrays: Arrays) -> dict[str, mx.array]:
        reduced = {n: v for n, v in arrays.items() if tuple(v.shape) != self._shapes[n]}
        whole = {name: value for name, value in arrays.items() if name not in reduced}
        names = self._loaded.names
        return names.export_weights(whole) | {names.to_hf_name(name): value for name, value in reduced.items()}

    def from_hf(self, tensors: Arrays) -> dict[str, mx.array]:
        imported = self._loaded.names.import_weights(tensors)
        return {name: value for name, value in imported.items() if name in self._shapes}

    def is_plain(self, name: str) -> bool:
        return _keeps_layout(self._loaded, name, self._shapes[name])

    def owners(self) -> dict[str, str]:
        return {hf_name: name for name in self._shapes for hf_name in self._loaded.names.to_hf_names(name)}

    def order(self) -> list[str] | None:
        if self._order is None:
            self._order = live_order(self._loaded.config)
        return self._order


def make_parameters(adapter: Adapter | None, loaded: LoadedModel, names: list[str]) -> Parameters:
    """The parameters of a run with ``adapter``, or of one that trains all weights when it is None."""
    return AdapterParameters(adapter) if adapter is not None else ModelParameters(loaded, names)


def live_order(config: Mapping[str, Any]) -> list[str] | None:
    """``named_parameters()`` of the torch model of a config.json, or None where torch is not installed.

    Raises:
        CheckpointError: transformers cannot build the model.
    """
    return [name for name, _ in build_live_model(config).named_parameters()] if has_torch() else None


def build_live_model(config: Mapping[str, Any]) -> Any:
    """:func:`hf_mlx.models.skeleton.build_skeleton`, for the sake of a checkpoint.

    Raises:
        CheckpointError: transformers cannot build the model.
    """
    try:
        return build_skeleton(config)
    except ModelError as error:
        raise CheckpointError(error.received, error.required, error.remedy) from error


def _with_idle(adapter: Adapter, names: list[str]) -> list[str]:
    """``names`` with the idle pairs where torch's ``named_parameters()`` has them."""
    before: list[str] = []
    for target in adapter.blueprint.wrapped:
        stem = f"{PREFIX}{target.key}.lora_"
        if not target.idle:
            following = next((i for i, name in enumerate(names) if name.startswith(stem)), None)
            if following is not None and before:
                names[following:following] = before
                before = []
        else:
            before += [f"{stem}A.weight", f"{stem}B.weight"]
    return [*names, *before]


def _plain(slot: Slot) -> str:
    return slot.mlx_path.replace(".base_layer.", ".")


def _import(loaded: LoadedModel, name: str, tensor: mx.array) -> mx.array:
    return loaded.names.import_weights({loaded.names.to_hf_name(name): tensor})[name]


def _keeps_layout(loaded: LoadedModel, name: str, shape: tuple[int, ...]) -> bool:
    probe = mx.arange(math.prod(shape)).reshape(shape)
    try:
        exported = list(loaded.names.export_weights({name: probe}).values())
    except ModelError:
        return False
    return len(exported) == 1 and exported[0].shape == probe.shape and bool(mx.array_equal(exported[0], probe).item())
