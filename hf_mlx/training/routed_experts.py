"""Experts of a mixture on sorted tokens, whose backward pass gathers where MLX's own would add scattered rows up.

mlx-lm sorts the chosen tokens by expert before the products (``SwitchGLU``, ``SwitchMLP``, mlx-lm 0.32). The way back
of each gather, and of each product, is then a sum over rows at indices, though every row is there once: here it is a
gather by the inverse order, and each token's sum over its experts runs over rows that lie side by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchGLU, SwitchLinear, SwitchMLP

from ..adapters.parts import LoRASwitchLinear
from ..device import on_cuda
from ..models.precision import CastSwitchLinear
from ..models.products import gather_mm
from .take_rows import take_rows
from .weight_gradients import project

#: Fewer choices are not sorted (mlx-lm 0.32 ``SwitchGLU``).
LEAST = 64
#: Columns for each choice of a token, up to which all experts' A are one product.
TOKEN_COLUMNS = 512


def route_experts(blocks: Iterable[nn.Module]) -> None:
    """Make the mixtures of ``blocks`` go back by gathers; no number changes but by the order of a sum.

    Args:
        blocks: With adapters attached. Instances get a subclass; names and parameters stay.
    """
    for block in blocks:
        for module in block.modules():
            if type(module) in (SwitchGLU, SwitchMLP):
                module.__class__ = _routed(type(module))
            elif type(module) in (SwitchLinear, CastSwitchLinear, QuantizedSwitchLinear):
                module.__class__ = _product(type(module))


def _routed(base: Any) -> Any:
    def call(self: Any, x: mx.array, indices: mx.array) -> mx.array:
        if not self.training or indices.size < LEAST:
            return base.__call__(self, x, indices)
        chosen, tokens = mx.stop_gradient(indices).flatten(), x.reshape(-1, x.shape[-1])
        order = mx.argsort(chosen)
        places = mx.arange(order.size, dtype=order.dtype)
        inverse = mx.put_along_axis(mx.zeros_like(order), order, places, axis=0)
        rows = _spread(tokens, order, inverse, indices.shape[-1])[:, None]
        sorted_choice = chosen[order]
        low = _lower({name: self[name] for name in first}, tokens, order, sorted_choice)
        inner = [self[name](rows, sorted_choice, sorted_indices=True, **low[name]) for name in first]
        # Between products, what is cheap to compute again is not kept.
        done = self[last](mx.checkpoint(self.activation)(*inner), sorted_choice, sorted_indices=True)
        return _permute(done.squeeze(-2), inverse, order).reshape(*indices.shape, -1)

    first, last = (("up_proj", "gate_proj"), "down_proj") if base is SwitchGLU else (("fc1",), "fc2")
    return type(f"Routed{base.__name__}", (base,), {"__call__": call})


def _lower(
    layers: Mapping[str, Any], tokens: mx.array, order: mx.array, chosen: mx.array
) -> dict[str, dict[str, mx.array]]:
    """``low`` for the call of each layer, where it is faster to multiply each token by the A of all experts."""
    made: dict[int, mx.array] = {}
    found: dict[str, dict[str, mx.array]] = {}
    for name, layer in layers.items():
        owner = getattr(layer, "owner", None)
        if isinstance(owner, LoRASwitchLinear) and _is_narrow(owner, order.size // tokens.shape[0]):
            if id(owner) not in made:
                made[id(owner)] = _pick(owner, tokens, order, chosen)
            found[name] = {"low": made[id(owner)]}
    return {name: found.get(name, {}) for name in layers}


def _is_narrow(owner: LoRASwitchLinear, times: int) -> bool:
    """Whether a product of every token with all experts' A takes less than gathered products of its ``times`` rows.

    CUDA's gathered products compute 128 columns, whatever the rank, at a third of the speed of a plain one.
    """
    return on_cuda() and owner.experts * owner.r <= TOKEN_COLUMNS * times


def _pick(owner: LoRASwitchLinear, tokens: mx.array, order: mx.array, chosen: mx.array) -> mx.array:
    """``owner``'s A of the chosen expert times each row, (T · times, 1, r); (T, experts · r) exists for it."""
    dtype = owner.compute_dtype
    low = project(tokens.astype(dtype), owner.lora_A.astype(dtype)).reshape(-1, owner.r)
    token = order // (order.size // tokens.shape[0])
    return low[token * owner.experts + chosen][:, None]


def _product(base: Any) -> Any:
    def call(self: Any, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        if not (self.training and sorted_indices) or self.trainable_parameters():
            return base.__call__(self, x, indices, sorted_indices=sorted_indices)

        def forward(x: mx.array) -> mx.array:
            return base.__call__(self, x, indices, sorted_indices=True)

        product: Any = mx.custom_function(forward)

        @product.vjp
        def backward(x: mx.array, by_out: mx.array, _: Any) -> mx.array:
            return _turned(self, by_out, indices).astype(x.dtype)

        return product(x)

    return type(f"Routed{base.__name__}", (base,), {"__call__": call})


def _turned(layer: Any, by_out: mx.array, indices: mx.array) -> mx.array:
    """The gradient by the input: each row times its expert's weight, (N, 1, in)."""
    options: dict[str, Any] = {"rhs_indices": indices, "sorted_indices": True}
    if "scales" not in layer:
        return gather_mm(by_out.astype(layer.weight.dtype), layer.weight, **options)
    return mx.gather_qmm(
        by_out,
        layer.weight,
        layer.scales,
        layer.get("biases"),
        transpose=False,
        group_size=layer.group_size,
        bits=layer.bits,
        mode=layer.mode,
        global_scale=layer.global_scale,
        **options,
    )


def _spread(x: mx.array, order: mx.array, inverse: mx.array, times: int) -> mx.array:
    """Row ``order[i] // times`` of ``x`` (T, D) at each i, (T · times, D)."""

    def forward(x: mx.array) -> mx.array:
        return take_rows(x, order // times)

    spread: Any = mx.custom_function(forward)

    @spread.vjp
    def backward(x: mx.array, by_out: mx.array, _: Any) -> mx.array:
        by_choice = take_rows(by_out, inverse).reshape(-1, times, by_out.shape[-1])
        # Written out, the sum is one kernel with a float32 accumulator.
        total = sum((by_choice[:, choice].astype(mx.float32) for choice in range(1, times)), by_choice[:, 0])
        return total.astype(x.dtype)

    return spread(x)


def _permute(x: mx.array, order: mx.array, inverse: mx.array) -> mx.array:
    """``x[order]``, for an ``order`` in which every row is once."""

    permute: Any = mx.custom_function(lambda x: take_rows(x, order))
    permute.vjp(lambda _, by_out, __: take_rows(by_out, inverse))
    return permute(x)
