"""The parameters of an MLX model under the names that transformers and PEFT give them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..adapters.adapter import PREFIX, Adapter, split_parameter
from ..adapters.layers import LoRAEmbedding, dense_weight
from ..adapters.order import order_key
from ..models.load import LoadedModel
from ..models.torch_arrays import to_parameter
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
        path = self.paths[name]
        owner, leaf = _owner(self.loaded.model, path), path.rsplit(".", 1)[-1]
        array = dense_weight(owner) if leaf == "weight" and "scales" in owner else owner[leaf]
        array = self.stored(name, path, array)
        trained, stored = path in self._trainable(), array
        copy = to_parameter(stored, trainable=trained)
        copy = mx.array(stored) if copy is stored else copy
        self.lent.add(Loan(name, path, stored, trained, partial(self._from_stored, name, path), copy, find_later(copy)))
        return copy

    def stored(self, name: str, path: str, array: mx.array) -> mx.array:
        """``array`` of the parameter's shape, in HF's layout."""
        adapted = any(part.startswith("lora_") for part in name.split("."))
        return array if adapted else self._stored_layout(path, array)

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

    def _stored_layout(self, path: str, array: mx.array) -> mx.array:
        plain = path.replace(".base_layer.", ".")
        stored = self.loaded.names.export_weights({plain: array}) if self._is_whole(plain) else {}
        return next(iter(stored.values()), array)

    def _from_stored(self, name: str, path: str, array: mx.array) -> mx.array:
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
                yield path, value.size * 32 // owner.bits if packed else value.size

    def _is_embedding(self, path: str) -> bool:
        owner = _owner(self.loaded.model, path)
        return isinstance(owner, (nn.Embedding, nn.QuantizedEmbedding, LoRAEmbedding))


def _owner(model: nn.Module, path: str) -> Any:
    node: Any = model
    for part in path.split(".")[:-1]:
        node = node[int(part)] if isinstance(node, list) else node[part]
    return node
