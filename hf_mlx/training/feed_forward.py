"""Feed-forward networks that keep their first products for the backward pass, and recompute what follows from them.

Between the products of ``down(silu(gate(x)) * up(x))`` lie only operations on single elements. Their results, with
those that the derivative needs, are as large as the products themselves, and cost next to nothing to compute again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..adapters.dropout import KeyedDropout
from ..adapters.layers import LoRALinear, layer_dims
from ..device import on_cpu
from ..models.activation_rounding import silu_product
from ..models.products import in_rows, in_shape_of
from ..models.rebinding import calls, rebound
from .exponential import sigmoid

_LINEAR = (nn.Linear, nn.QuantizedLinear, LoRALinear)


def recompute_activations(blocks: Iterable[nn.Module]) -> None:
    """Make the feed-forward networks of ``blocks`` forget everything but their first products; no number changes.

    One is recognised by its parts: linear layers and nothing else that holds arrays, called with one array. What it
    does with them is its own: the layers that read the input are computed first, and its code then runs on their
    results under a checkpoint. The class is left alone: the instances get a subclass.

    Args:
        blocks: Recomputed as a whole or not: that decides when the products are computed, not what follows from them.
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
    """A linear layer that notes what it was called with.

    Attributes:
        calls: How often.
        input, output: Of the last call.
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.calls = 0
        self.input: mx.array | None = None
        self.output: mx.array | None = None

    def __call__(self, x: mx.array) -> mx.array:
        self.calls += 1
        output = self.layer(x)
        self.input, self.output = x, output
        return output

    def is_called_once_with(self, x: mx.array) -> bool:
        return self.calls == 1 and self.input is x


def _silu_product(gate: mx.array, x: mx.array) -> mx.array:
    return gate * sigmoid(gate) * x if gate.dtype == mx.float32 else silu_product(gate, x)


def _recomputing(base: type[nn.Module]) -> type[nn.Module]:
    compute: Any = base.__call__
    if on_cpu() and calls(compute, "swiglu", silu_product):
        compute = rebound(compute, "swiglu", _silu_product)

    def run_with(self: nn.Module, x: mx.array, layers: Mapping[str, Callable[[mx.array], mx.array]]) -> mx.array:
        stand_in = copy(self)
        stand_in |= layers
        return compute(stand_in, x)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> mx.array:
        if not self.training or kwargs or len(args) != 1:
            return base.__call__(self, *args, **kwargs)
        (x,) = args
        rows = _rows(self, x)
        if rows is not x and _works(lambda: in_shape_of(x, base.__call__(self, rows))):
            return in_shape_of(x, run(self, rows))
        return run(self, x)

    def run(self: nn.Module, x: mx.array) -> mx.array:
        observed = {name: _Observed(child) for name, child in self.children().items() if isinstance(child, _LINEAR)}
        output = run_with(self, x, observed)
        first = {name: layer.output for name, layer in observed.items() if layer.is_called_once_with(x)}
        rest = [name for name in observed if name not in first]
        if not first or not rest:
            return output

        def with_products(x: Any, products: Sequence[mx.array], others: Mapping[str, Any]) -> mx.array:
            known = dict(zip(first, products, strict=True))
            return run_with(self, x, {**{name: lambda _, name=name: known[name] for name in known}, **others})

        products: list[Any] = list(first.values())
        last = observed[rest[-1]]
        if len(rest) == 1 and last.calls == 1 and last.output is output:
            others = {rest[0]: lambda hidden: hidden}
            if _works(lambda: with_products(None, products, others)):
                return _close(self[rest[0]], lambda *read: with_products(None, read, others), products)
            return _close(self[rest[0]], lambda x, *read: with_products(x, read, others), [x, *products])

        def remainder(x: mx.array, products: list[mx.array], params: dict[str, Any]) -> mx.array:
            self.update(params)
            return with_products(x, products, {})

        # Gradients flow only through explicit arguments, so the parameters of the other layers must be among them.
        params = {name: self[name].trainable_parameters() for name in rest}
        try:
            return mx.checkpoint(remainder)(x, products, params)
        finally:
            self.update(params)

    return type(f"Recomputing{base.__name__}", (base,), {"__call__": call})


def _rows(module: nn.Module, x: mx.array) -> mx.array:
    """``x`` in rows of one token, which MLX would make of it for each product; dropout draws by rows of a batch."""
    drops = any(isinstance(part, KeyedDropout) for part in module.modules())
    return x if x.ndim < 3 or drops else in_rows(x)


def _works(call: Callable[[], Any]) -> bool:
    try:
        call()
    except (AttributeError, TypeError, ValueError):
        return False
    return True


def _close(layer: nn.Module, between: Callable[..., mx.array], read: Sequence[mx.array]) -> mx.array:
    """``layer(between(*read))``, of which the backward pass keeps ``read`` alone.

    On the way back what lies between is computed anew for the layer's own gradients and for each derivative: the
    compiler makes one kernel of each, and what two of them shared would be written to memory instead. On a CPU that
    is cheaper than another exponential.
    """
    trained = layer.trainable_parameters()
    flat: Any = tree_flatten(trained)
    count = len(read)

    def project(hidden: mx.array, *params: mx.array) -> mx.array:
        names = (name for name, _ in flat)
        layer.update(tree_unflatten(list(zip(names, params, strict=True))))
        return layer(hidden)

    def forward(*primals: mx.array) -> mx.array:
        return project(between(*primals[:count]), *primals[count:])

    def backward(primals: Any, by_output: mx.array, _: Any) -> tuple[mx.array, ...]:
        # MLX hands over a single primal as it is.
        primals = [primals] if isinstance(primals, mx.array) else list(primals)
        read, params = primals[:count], primals[count:]
        # Not before the gradient is there, or it would be kept after all.
        ready = mx.depends(read, [by_output])
        if on_cpu():
            return tuple(mx.vjp(forward, [*ready, *params], [by_output])[1])
        # A trained layer has its weight's gradient first: `hidden` is gone when its own comes.
        _, (by_hidden, *by_params) = mx.vjp(project, [between(*ready), *params], [by_output])
        # Its own copies for each, or the compiler would find out what they share; and each after the one before, which
        # then may lie where what is read no more did.
        by_read = []
        for index in range(count):
            done = [by_hidden, *by_params, *by_read]
            by_read.append(_derive(between, [mx.depends([x], done)[0] for x in read], index, by_hidden))
        return (*by_read, *by_params)

    closed: Any = mx.custom_function(forward)
    closed.vjp(backward)
    try:
        return closed(*read, *(value for _, value in flat))
    finally:
        layer.update(trained)


def _derive(function: Callable[..., mx.array], args: list[mx.array], index: int, cotangent: mx.array) -> mx.array:
    """The vector-Jacobian product of ``function`` by ``args[index]`` alone."""
    _, (by_arg,) = mx.vjp(lambda arg: function(*args[:index], arg, *args[index + 1 :]), [args[index]], [cotangent])
    return by_arg
