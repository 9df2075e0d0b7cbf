"""The parameters of an MLX model under the names that transformers and PEFT give them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property, partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..adapters.adapter import PREFIX, Adapter, split_parameter
from ..adapters.layers import LoRAEmbedding, dense_weight
from ..adapters.order import order_key
from ..models.load import LoadedModel
from ..models.torch_arrays import to_parameter, to_torch
from .gradients import read_written
from .loans import Loan, Loans, find_later

# The adapter's name in PEFT's live parameter names; ``get_peft_model`` gives it this one.
ADAPTER_NAME = "default"
_PACKING = (".scales", ".biases")


class Parameters:
    """Names, copies and counts of a model's parameters.

    Stacked experts are one array here: ``experts.*.`` stands for all of them.

    Args:
        loaded: The MLX model and its names.
        adapter: The attached adapter, or None.
    """

    def __init__(self, loaded: LoadedModel, adapter: Adapter | None) -> None:
        self.loaded = loaded
        self.adapter = adapter
        self.lent = Loans()
        self.gradients = GradientCopies(self)

    @cached_property
    def paths(self) -> dict[str, str]:
        """HF (or live PEFT) name to MLX path, in the order of ``named_parameters()`` upstream."""
        flat = [path for path, _ in tree_flatten(self.loaded.model.parameters()) if not path.endswith(_PACKING)]
        names = {path: self._name(path) for path in flat}
        key = order_key(self.loaded.model_type, [name.rsplit(".", 1)[0] for name in names.values()])
        return {names[path]: path for path in sorted(flat, key=lambda path: key(names[path]))}

    def copy(self, name: str) -> Any:
        """A copy of one parameter in HF's layout: a ``torch.nn.Parameter`` where torch is installed, else MLX's.

        Raises:
            KeyError: There is none of that name.
        """
        if name in self.lent.fresh:
            return self.lent.fresh[name]
        path, stored = self.paths[name], self.read(name)
        trained = path in self._trainable()
        copy = to_parameter(stored, trainable=trained)
        copy = mx.array(stored) if copy is stored else copy
        self.gradients.give(name, path, copy)
        self.lent.add(Loan(name, path, stored, trained, partial(self.from_stored, name, path), copy, find_later(copy)))
        return copy

    def read(self, name: str) -> mx.array:
        """One parameter in HF's layout.

        Raises:
            KeyError: There is none of that name.
        """
        path = self.paths[name]
        owner, leaf = _owner(self.loaded.model, path), path.rsplit(".", 1)[-1]
        array = dense_weight(owner) if leaf == "weight" and "scales" in owner else owner[leaf]
        return self.to_stored(name, path, array)

    def copies_at(self, paths: Iterable[str]) -> list[Any]:
        """Copies of the parameters at these MLX paths, in the order of :attr:`paths`."""
        wanted = set(paths)
        return [self.copy(name) for name, path in self.paths.items() if path in wanted]

    def count(self, *, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many numbers they hold; a quantised weight counts as what it stands for."""
        trainable = self._trainable() if only_trainable else None
        return sum(
            size
            for path, size in self._sizes()
            if (trainable is None or path in trainable) and not (exclude_embeddings and self._is_embedding(path))
        )

    def dtype(self) -> mx.Dtype:
        """Of the first floating one."""
        flat: dict[str, Any] = dict(tree_flatten(self.loaded.model.parameters()))
        return next(value.dtype for value in flat.values() if mx.issubdtype(value.dtype, mx.floating))

    def _name(self, path: str) -> str:
        if self.adapter is None:
            return self.loaded.names.to_hf_names(path)[0].replace(".experts.0.", ".experts.*.")
        name = self.adapter.hf_name(path)
        leaf = split_parameter(path)[1]
        if leaf.startswith(("lora_embedding", "trainable_tokens")):
            return f"{name}.{ADAPTER_NAME}"
        if leaf.startswith("lora_magnitude"):
            return f"{name}.{ADAPTER_NAME}.weight"
        if leaf.startswith("lora_"):
            stem, _, last = name.rpartition(".")
            return f"{stem}.{ADAPTER_NAME}.{last}"
        saved = next((s for s in self.adapter.blueprint.saved if f"{path}.".startswith(f"{s.mlx_path}.")), None)
        if saved is not None:
            stem = f"{PREFIX}{saved.hf_path}"
            return f"{stem}.modules_to_save.{ADAPTER_NAME}{name.removeprefix(stem)}"
        return name

    def to_stored(self, name: str, path: str, array: mx.array) -> mx.array:
        """An array of the shape of the parameter at ``path``, in the layout of HF's ``name``."""
        plain = path.replace(".base_layer.", ".")
        if any(part.startswith("lora_") for part in name.split(".")) or not self._is_whole(plain):
            return array
        return next(iter(self.loaded.names.export_weights({plain: array}).values()), array)

    def from_stored(self, name: str, path: str, array: mx.array) -> mx.array:
        """The way back."""
        plain = path.replace(".base_layer.", ".")
        if any(part.startswith("lora_") for part in name.split(".")) or not self._is_whole(plain):
            return array
        return self.loaded.names.import_weights({self.loaded.names.to_hf_name(plain): array})[plain]

    def _is_whole(self, path: str) -> bool:
        # One tensor on each side: neither stacked experts nor a part of a fused layer.
        names = self.loaded.names.to_hf_names(path)
        return len(names) == 1 and self.loaded.names.from_hf_name(names[0]) == path and names[0] not in self._fused

    @cached_property
    def _fused(self) -> set[str]:
        plain = [path.replace(".base_layer.", ".") for path, _ in tree_flatten(self.loaded.model.parameters())]
        named = [name for path in plain for name in self.loaded.names.to_hf_names(path)]
        return {name for name in named if named.count(name) > 1}

    def _trainable(self) -> set[str]:
        return {path for path, _ in tree_flatten(self.loaded.model.trainable_parameters())}

    def _sizes(self) -> Iterator[tuple[str, int]]:
        flat: dict[str, Any] = dict(tree_flatten(self.loaded.model.parameters()))
        for path, value in flat.items():
            if not path.endswith(_PACKING):
                owner = _owner(self.loaded.model, path)
                packed = path.endswith(".weight") and "scales" in owner
                size: Any = self.loaded.sizes.get(path, value.size)
                yield path, size * 32 // owner.bits if packed else size

    def _is_embedding(self, path: str) -> bool:
        owner = _owner(self.loaded.model, path)
        return isinstance(owner, (nn.Embedding, nn.QuantizedEmbedding, LoRAEmbedding))


class GradientCopies:
    """Gradients on the copies that are handed out while a callback may look at them.

    Args:
        parameters: Names and layouts.
    """

    def __init__(self, parameters: Parameters) -> None:
        self._parameters = parameters
        self._grads: dict[str, mx.array] = {}
        self._given: list[tuple[str, str, Any, mx.array]] = []

    def lend(self, grads: dict[str, mx.array]) -> None:
        """Copies that are made from now on have these, by MLX path, as ``grad``."""
        self._grads = grads

    def give(self, name: str, path: str, copy: Any) -> None:
        """Set ``grad`` on a copy, where there is one and torch is installed."""
        if path not in self._grads or isinstance(copy, mx.array):
            return
        stored = self._parameters.to_stored(name, path, self._grads[path])
        copy.grad = to_torch(stored)
        self._given.append((name, path, copy, stored))

    def take(self) -> dict[str, mx.array]:
        """End the loan; by MLX path, what was written into the gradients of copies."""
        given, self._given, self._grads = self._given, [], {}
        written: dict[str, mx.array] = {}
        for name, path, copy, lent in given:
            value = read_written(name, copy, lent)
            if value is not None:
                written[path] = self._parameters.from_stored(name, path, value)
        return written


def _owner(model: nn.Module, path: str) -> Any:
    node: Any = model
    for part in path.split(".")[:-1]:
        node = node[int(part)] if isinstance(node, list) else node[part]
    return node
