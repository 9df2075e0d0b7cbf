"""Experts of a mixture on sorted tokens, whose backward pass gathers where MLX's own would add scattered rows up.

mlx-lm sorts the chosen tokens by expert before the products (``SwitchGLU``, ``SwitchMLP``, mlx-lm 0.32). The way back
of each gather, and of each product, is then a sum over rows at indices, though every row is there once: here it is a
gather by the inverse order, and each token's sum over its experts runs over rows that lie side by side.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchGLU, SwitchLinear, SwitchMLP

from ..models.precision import CastSwitchLinear
from ..models.products import gather_mm

#: Fewer choices are not sorted (mlx-lm 0.32 ``SwitchGLU``).
LEAST = 64


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
        chosen = mx.stop_gradient(indices).flatten()
        order = mx.argsort(chosen)
        inverse = mx.argsort(order)
        rows = _spread(x.reshape(-1, x.shape[-1]), order, inverse, indices.shape[-1])
        done = self.compute(rows[:, None], chosen[order])
        return _permute(done.squeeze(-2), inverse, order).reshape(*indices.shape, -1)

    def compute_glu(self: Any, x: mx.array, indices: mx.array) -> mx.array:
        up = self.up_proj(x, indices, sorted_indices=True)
        gate = self.gate_proj(x, indices, sorted_indices=True)
        # Between products, what is cheap to compute again is not kept.
        return self.down_proj(mx.checkpoint(self.activation)(up, gate), indices, sorted_indices=True)

    def compute_mlp(self: Any, x: mx.array, indices: mx.array) -> mx.array:
        inner = self.fc1(x, indices, sorted_indices=True)
        return self.fc2(mx.checkpoint(self.activation)(inner), indices, sorted_indices=True)

    compute = compute_glu if base is SwitchGLU else compute_mlp
    return type(f"Routed{base.__name__}", (base,), {"__call__": call, "compute": compute})


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
        return x[order // times]

    spread: Any = mx.custom_function(forward)

    @spread.vjp
    def backward(x: mx.array, by_out: mx.array, _: Any) -> mx.array:
        by_choice = by_out[inverse].reshape(-1, times, by_out.shape[-1])
        # Written out, the sum is one kernel with a float32 accumulator.
        total = sum((by_choice[:, choice].astype(mx.float32) for choice in range(1, times)), by_choice[:, 0])
        return total.astype(x.dtype)

    return spread(x)


def _permute(x: mx.array, order: mx.array, inverse: mx.array) -> mx.array:
    """``x[order]``, for an ``order`` in which every row is once."""

    def forward(x: mx.array) -> mx.array:
        return x[order]

    permute: Any = mx.custom_function(forward)

    @permute.vjp
    def backward(_: mx.array, by_out: mx.array, __: Any) -> mx.array:
        return by_out[inverse]

    return permute(x)
