"""An adapter on a model that several processes hold together.

Where a layer's outputs are divided, so are the rows of B, and every process has all of A; where its inputs are, so are
the columns of A, and every process has all of B. The factor that is whole sees a part of the layer on each process,
so its gradient is the sum over all of them; that of the other is complete as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from ..errors import AdapterError, TrainingError
from ..models.load import module_at
from ..models.tensor_parallel import check_split, exchange_around, sees_a_part, split_layers
from ..processes.comparison import digest_arrays
from ..processes.world import World
from .adapter import Adapter
from .layers import LoRAEmbedding, LoRALinear
from .parts import LoRAPart, LoRARouter, LoRASwitchLinear, split_rows
from .slots import Slot, list_slots

Arrays = Mapping[str, mx.array]
_KINDS = (LoRALinear, LoRAEmbedding, LoRASwitchLinear, LoRAPart, LoRARouter)


class Split:
    """How the arrays of an adapter lie on several processes.

    Methods that return whole arrays are called by every process.

    Args:
        world: The processes.
        axes: Along which axis each array is cut that is, and of how many arrays end to end; by MLX name.
        partial: Names of whole arrays of whose gradients each process has a part.
        slots: What an adapter file holds, in whole shapes, by PEFT's key.
    """

    def __init__(
        self, world: World, axes: Mapping[str, tuple[int, int]], partial: frozenset[str], slots: Mapping[str, Slot]
    ) -> None:
        self.world, self.axes, self.partial, self.slots = world, dict(axes), partial, slots

    def complete(self, arrays: Arrays) -> dict[str, mx.array]:
        """Of the divided arrays among these the whole ones, whether they are whole already or parts."""
        shapes = {slot.mlx_path: slot.shape for slot in self.slots.values()}
        parts = {name: arrays[name] for name in self.axes if tuple(arrays[name].shape) != shapes[name]}
        return {name: self._join(name, part, "an adapter that rank 0 writes") for name, part in parts.items()}

    def join(self, arrays: Arrays, what: str) -> dict[str, mx.array]:
        """The whole arrays, of any of their parts: parameters, or moments.

        Raises:
            TrainingError: What every process holds is not the same on all of them.
        """
        self._check({name: array for name, array in arrays.items() if name not in self.axes}, what)
        return {name: self._join(name, array, what) for name, array in arrays.items()}

    def cut(self, arrays: Arrays) -> dict[str, mx.array]:
        """This process's part of whole arrays."""
        return {name: self._cut(name, array) for name, array in arrays.items()}

    def join_gradients(self, grads: Arrays, what: str) -> dict[str, mx.array]:
        """The gradients of the whole arrays."""
        summed = self.world.sum({name: grads[name] for name in grads if name in self.partial}, what)
        return {name: summed.get(name, self._join(name, grad, what)) for name, grad in grads.items()}

    def cut_gradients(self, grads: Arrays) -> dict[str, mx.array]:
        """What :meth:`join_gradients` makes the same of: its sums are on the first process alone."""
        own = self.cut(grads)
        others = () if self.world.is_main else self.partial & own.keys()
        return own | {name: mx.zeros_like(own[name]) for name in others}

    def _join(self, name: str, array: mx.array, what: str) -> mx.array:
        if name not in self.axes:
            return array
        axis, count = self.axes[name]
        parts = [mx.split(part, count, axis=axis) for part in self.world.gather_array(array, what)]
        return mx.concatenate([part[place] for place in range(count) for part in parts], axis=axis)

    def _cut(self, name: str, array: mx.array) -> mx.array:
        if name not in self.axes:
            return array
        axis, count = self.axes[name]
        wholes = mx.split(array, count, axis=axis)
        return mx.concatenate([mx.split(w, self.world.size, axis=axis)[self.world.rank] for w in wholes], axis=axis)

    def _check(self, arrays: Arrays, what: str) -> None:
        digests = self.world.gather_object(digest_arrays(arrays), what)
        other = next((rank for rank, digest in enumerate(digests) if digest != digests[0]), None)
        if other is not None:
            raise TrainingError(
                f"other numbers on rank {other} than on rank 0, in arrays that both hold whole, at {what}",
                "the same on all processes: they are computed from the same sums",
                "machines of one kind, with the same versions of macOS and mlx; then trainer.train("
                "resume_from_checkpoint=True) from the last checkpoint",
            )


def split_model(adapter: Adapter, world: World) -> Adapter:
    """Leave of an adapted model this process's part, in place; nothing is evaluated.

    Args:
        adapter: Freshly attached; its base may still be unread files.
        world: The processes.

    Returns:
        The adapter, which knows how its arrays lie.

    Raises:
        ModelError: The model cannot be split.
        AdapterError: The adapter is on a layer that cannot be.
    """
    loaded, model = adapter.loaded, adapter.loaded.model
    check_split(loaded, world.size)
    slots = list_slots(loaded, adapter.plan, adapter.blueprint)
    flat: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    loaded.sizes = {path: value.size for path, value in flat.items()}
    adapted = {path: module_at(model, path) for target in adapter.targets for path in target.paths}
    for path, layer in adapted.items():
        if type(layer) not in _KINDS:
            raise _unlike(path, layer, world.size)
    # mlx-lm cuts the layers that it has made itself, and may make others in their place.
    model.update_modules(tree_unflatten([(path, layer.base_layer) for path, layer in adapted.items()]))
    cuts = split_layers(loaded, world.group)
    model.freeze()
    model.update_modules(tree_unflatten(list(adapted.items())))
    axes: dict[str, tuple[int, int]] = {}
    partial: set[str] = set()
    strided = {site.mlx_path: site.strided for site in adapter.blueprint.sites}
    for target in adapter.targets:
        path, cut = target.mlx_path, cuts.get(target.mlx_path)
        if cut is None:
            partial |= {f"{path}.{leaf}" for leaf in ("lora_A", "lora_B") if sees_a_part(model, path)}
            continue
        divided, whole = ("lora_B", "lora_A") if cut.axis == 0 else ("lora_A", "lora_B")
        # Rows of several parts lie end to end, and each process has some of each; where they take turns, they still do.
        axes[f"{path}.{divided}"] = cut.axis, 1 if strided[path] else len(target.paths)
        partial.add(f"{path}.{whole}")
    split = Split(world, axes, frozenset(partial), slots)
    for target in adapter.targets:
        if target.mlx_path in cuts:
            _cut_pair([adapted[path] for path in target.paths], target.mlx_path, split, strided[target.mlx_path])
    exchange_around(model, cuts, world.group)
    return replace(adapter, split=split)


def _cut_pair(layers: list[Any], path: str, split: Split, strided: bool) -> None:
    """Leave of the pair of the first of ``layers``, which are the parts of one, what belongs to the cut base."""
    first = layers[0]
    cut = split.cut({name: first[leaf] for leaf in ("lora_A", "lora_B") if (name := f"{path}.{leaf}") in split.axes})
    for name, value in cut.items():
        first[name.rpartition(".")[2]] = value
    if f"{path}.lora_A" in cut and "lora_dropout" in first:
        first.lora_dropout.divide(split.world.rank, split.world.size)
    if isinstance(first, LoRASwitchLinear):
        for layer, rows in zip(layers, split_rows([part.base_layer for part in layers], strided=strided), strict=True):
            layer.hold(rows)


def _unlike(path: str, layer: object, ways: int) -> AdapterError:
    return AdapterError(
        f"an adapter on {path} ({type(layer).__name__}), of a model that is split over {ways} processes",
        "adapters on Linear layers, experts and their routers",
        'LoraConfig(..., target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])',
    )
