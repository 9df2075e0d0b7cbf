"""Feed-forward networks that keep their first products for the backward pass, and recompute what follows from them.

Between the products of ``down(silu(gate(x)) * up(x))`` lie only operations on single elements. Their results, with
those that the derivative needs, are as large as the products themselves, and cost next to nothing to compute again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..adapters.layers import LoRALinear, layer_dims

_LINEAR = (nn.Linear, nn.QuantizedLinear, LoRALinear)


def recompute_activations(blocks: Iterable[nn.Module]) -> None:
    """Make the feed-forward networks of ``blocks`` forget everything but their first products; no number changes.

    One is recognised by its parts: linear layers and nothing else that holds arrays, called with one array. What it
    does with them is its own: the layers that read the input are computed first, and its code then runs on their
    results under a checkpoint. The class is left alone: the instances get a subclass.

    Args:
        blocks: Blocks that keep their activations; one that is recomputed as a whole gains nothing here.
    """
    for block in blocks:
        for module in block.modules():
            if _is_feed_forward(module):
                module.__class__ = _recomputing(type(module))


def recomputed_inputs(module: nn.Module) -> list[nn.Module]:
    """The linear layers of a feed-forward network whose input is not kept: those that read more than the others do."""
    if not _is_feed_forward(module):
        return []
    linear: list[Any] = [
        getattr(child, "base_layer", child) for child in module.children().values() if isinstance(child, _LINEAR)
    ]
    narrowest = min(layer_dims(layer)[0] for layer in linear)
    return [layer for layer in linear if layer_dims(layer)[0] > narrowest]


def _is_feed_forward(module: nn.Module) -> bool:
    children = module.children()
    linear = [child for child in children.values() if isinstance(child, _LINEAR)]
    others = [value for name, value in module.items() if not isinstance(children.get(name), _LINEAR)]
    return len(linear) > 1 and not isinstance(module, _LINEAR) and not any(_holds_arrays(value) for value in others)


def _holds_arrays(value: Any) -> bool:
    if isinstance(value, nn.Module):
        return bool(value.parameters())
    return isinstance(value, (mx.array, dict, list, tuple))


class _Observed:
    """A linear layer that keeps what it makes of ``x`` itself, if it is called for that once and for nothing else."""

    def __init__(self, layer: Any, x: mx.array) -> None:
        self.layer, self.x = layer, x
        self.calls = 0
        self.product: mx.array | None = None

    def __call__(self, x: mx.array) -> mx.array:
        product = self.layer(x)
        self.calls += 1
        self.product = product if self.calls == 1 and x is self.x else None
        return product


def _recomputing(base: type[nn.Module]) -> type[nn.Module]:
    def run_with(self: nn.Module, x: mx.array, layers: Mapping[str, Callable[[mx.array], mx.array]]) -> mx.array:
        stand_in = copy(self)
        stand_in |= layers
        return base.__call__(stand_in, x)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> mx.array:
        if not self.training or kwargs or len(args) != 1:
            return base.__call__(self, *args, **kwargs)
        (x,) = args
        observed = {name: _Observed(child, x) for name, child in self.children().items() if isinstance(child, _LINEAR)}
        output = run_with(self, x, observed)
        products = {name: layer.product for name, layer in observed.items() if layer.product is not None}
        if not products or len(products) == len(observed):
            return output

        def rest(x: mx.array, products: dict[str, mx.array], params: dict[str, Any]) -> mx.array:
            self.update(params)
            return run_with(self, x, {name: lambda _, name=name: products[name] for name in products})

        # Gradients flow only through explicit arguments, so the parameters of the other layers must be among them.
        params = {name: self[name].trainable_parameters() for name in observed if name not in products}
        try:
            return mx.checkpoint(rest)(x, products, params)
        finally:
            self.update(params)

    return type(f"Recomputing{base.__name__}", (base,), {"__call__": call})
