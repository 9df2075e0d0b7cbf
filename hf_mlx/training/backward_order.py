"""The order of the backward pass: a layer's own gradients before those of the layers below it.

MLX orders the operations of a graph itself, and nothing in a backward pass asks for the gradient of a weight before
the update does. Computed late, each one keeps its layer's input and its output's gradient alive until then. Here the
gradient that goes on down waits for those of the weights, so both arrays are freed as the pass goes by. Adapted and
trained linear layers wait by themselves; an identity around a part makes all else that trains in it wait, and costs the
host as much as twenty other operations.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from ..models.heads import layers, trained_arrays

# Where arrays between two parts are noted at the moment.
_NOTED: list[list[mx.array]] = []


def order_backward(blocks: Iterable[nn.Module]) -> None:
    """Make the parts of ``blocks`` (attention, feed-forward network, norms) order their gradients.

    No number changes: a part is the only reader of its input, so nothing is summed otherwise than before. The class
    is left alone: the instances get a subclass.

    Args:
        blocks: With their trainable parameters chosen; names and parameters stay as they are.
    """
    for block in blocks:
        for module in block.modules():
            if isinstance(module, nn.Linear) and hasattr(module, "orders_backward"):
                module.orders_backward = True
        for part in block.children().values():
            if isinstance(part, nn.Module) and trained_arrays(part):
                part.__class__ = _ordered(type(part))


def gradient_stages(model: nn.Module, arrays: Mapping[str, mx.array], ends: Sequence[float]) -> list[list[str]]:
    """Names of ``arrays`` in the stages in which their gradients come.

    A stage ends with the largest arrays of a block: with as much work for a device as there is in a row.

    Args:
        model: An mlx-lm model that holds ``arrays``; those outside its blocks are in no stage.
        arrays: By name.
        ends: Shares of the blocks that are still to go back when a stage ends, from large to small.

    Returns:
        A list for each end, empty where that lies in the same block as the one before it. The last to come is named
        first, since MLX begins with what it is asked for last.
    """
    names, blocks = {id(array): name for name, array in arrays.items()}, layers(model)
    coming: list[str] = []
    # How many have come when a block has its largest.
    counts: dict[int, int] = {}
    for place, block in reversed(list(enumerate(blocks))):
        own = [names[id(array)] for array in trained_arrays(block).values() if id(array) in names]
        largest = max((arrays[name].size for name in own), default=0)
        coming += (name for name in own if arrays[name].size == largest)
        counts[place] = len(coming)
        coming += (name for name in own if arrays[name].size < largest)
    places = (int(share * len(blocks)) for share in ends)
    return [coming[begin:end][::-1] for begin, end in pairwise([0, *(counts.get(place, 0) for place in places)])]


def _unordered(part: nn.Module) -> dict[str, mx.array]:
    """What trains in ``part``, by name, but for the layers that order their gradients themselves."""
    modules = part.named_modules()
    ordered = tuple(f"{path}." if path else "" for path, module in modules if getattr(module, "orders_backward", False))
    return {name: value for name, value in trained_arrays(part).items() if not name.startswith(ordered)}


@contextmanager
def noting_places() -> Iterator[list[mx.array]]:
    """What goes from one part to the next while a step is traced in the block: forwards, then backwards.

    Each array takes about as many operations more than the one before it.
    """
    places: list[mx.array] = []
    _NOTED.append(places)
    try:
        yield places
    finally:
        _NOTED.pop()


def _note(x: mx.array) -> mx.array:
    if _NOTED:
        _NOTED[-1].append(x)
    return x


def _together(x: mx.array, params: dict[str, mx.array]) -> tuple[mx.array, Any]:
    """``x`` and the tree ``params`` as they are; the gradient of ``x`` is there only once those of ``params`` are."""
    identity: Any = mx.custom_function(lambda *arrays: arrays)

    @identity.vjp
    def backward(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, ...]:
        by_x, *by_params = cotangents
        if by_params:
            (by_x,) = mx.depends([by_x], by_params)
        return (_note(by_x), *by_params)

    x, *values = identity(_note(x), *params.values())
    return x, tree_unflatten(list(zip(params, values, strict=True)))


def _ordered(base: type[nn.Module]) -> type[nn.Module]:
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not (self.training and args and isinstance(args[0], mx.array)):
            return base.__call__(self, *args, **kwargs)
        params = _unordered(self)
        if not params and not _NOTED:
            return base.__call__(self, *args, **kwargs)
        trained = self.trainable_parameters()
        x, ordered = _together(args[0], params)
        self.update(ordered)
        try:
            return base.__call__(self, x, *args[1:], **kwargs)
        finally:
            self.update(trained)

    return type(f"Ordered{base.__name__}", (base,), {"__call__": call})
