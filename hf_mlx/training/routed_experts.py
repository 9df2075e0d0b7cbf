"""Experts of a mixture on sorted tokens, whose backward pass gathers where MLX's own would add scattered rows up.

mlx-lm sorts the chosen tokens by expert before the products (``SwitchGLU``, ``SwitchMLP``, mlx-lm 0.32). The way back
of each gather, and of each product, is then a sum over rows at indices, though every row is there once: here it is a
gather by the inverse order, and each token's sum over its experts runs over rows that lie side by side. Where many rows
go to an expert, they lie in tiles (:class:`~hf_mlx.training.expert_rows.ExpertRows`) on CUDA.
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
from ..models.products import HALF, gather_mm, matmul, pick
from .expert_rows import ExpertRows, most_tiles
from .weight_gradients import look_up, project

#: Fewer choices are not sorted (mlx-lm 0.32 ``SwitchGLU``).
LEAST = 64
#: Columns for each choice of a token, up to which all experts' A are one product.
TOKEN_COLUMNS = 512
#: Rows of a tile are a multiple of the first. An expert has as many as the second on average, or none lie in tiles.
TILE, LEAST_ROWS = 64, 384
#: Numbers in the weights of all tiles, at most.
LARGEST_COPY = 2**31 - 1


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
        layers = {name: self[name] for name in (*first, last)}
        laid = ExpertRows.sort(chosen, indices.shape[-1], *tile_size(layers.values(), chosen.size))
        rows = laid.spread(tokens)
        low = _lower({name: layers[name] for name in first}, tokens, laid)
        inner = [layers[name](rows, laid.experts, sorted_indices=True, **low[name]) for name in first]
        # Between products, what is cheap to compute again is not kept.
        done = layers[last](mx.checkpoint(self.activation)(*inner), laid.experts, sorted_indices=True)
        return laid.gather(done).reshape(*indices.shape, -1)

    first, last = (("up_proj", "gate_proj"), "down_proj") if base is SwitchGLU else (("fc1",), "fc2")
    return type(f"Routed{base.__name__}", (base,), {"__call__": call})


def tile_size(layers: Iterable[Any], choices: int) -> tuple[int, int]:
    """Rows of a tile, and how many experts there are; 1 row where gathered products are as fast, or nothing else works.

    CUDA's gathered products reach a seventh of the speed of plain ones in half precision, which outweighs a copy of the
    weights for each tile and half as many rows again. A tile has about half as many rows as an expert gets.
    """
    bases = _bases(layers)
    experts = bases[0].weight.shape[0]
    if not on_cuda() or choices < LEAST_ROWS * experts:
        return 1, experts
    size = -(-choices // (2 * experts * TILE)) * TILE
    tiles = most_tiles(choices, size, experts)
    for base in bases:
        dense = isinstance(base, SwitchLinear) and base.weight.dtype in HALF and not base.trainable_parameters()
        if not dense or tiles * base.weight.size > LARGEST_COPY * experts:
            return 1, experts
    return size, experts


def copied_bytes(module: nn.Module, choices: int) -> int:
    """What a mixture's tiles take beyond their rows: the copied weights of two products, one done and one at work.

    Args:
        module: With or without adapters; 0 for what is no mixture.
        choices: Tokens of a micro-batch times the experts of each.
    """
    if not isinstance(module, SwitchGLU | SwitchMLP):
        return 0
    layers = module.children().values()
    size, experts = tile_size(layers, choices)
    largest = max(base.weight.nbytes for base in _bases(layers))
    return 2 * most_tiles(choices, size, experts) * largest // experts if size > 1 else 0


def _bases(layers: Iterable[Any]) -> list[Any]:
    """What holds the weights of ``layers``; an activation holds none."""
    bases = (getattr(layer, "base_layer", layer) for layer in layers)
    return [base for base in bases if "weight" in base]


def _lower(layers: Mapping[str, Any], tokens: mx.array, laid: ExpertRows) -> dict[str, dict[str, mx.array]]:
    """``low`` for the call of each layer, where it is faster to multiply each token by the A of all experts."""
    made: dict[int, mx.array] = {}
    found: dict[str, dict[str, mx.array]] = {}
    for name, layer in layers.items():
        owner = getattr(layer, "owner", None)
        if isinstance(owner, LoRASwitchLinear) and _is_narrow(owner, laid.times):
            if id(owner) not in made:
                dtype = owner.compute_dtype
                low = project(tokens.astype(dtype), owner.lora_A.astype(dtype))
                made[id(owner)] = laid.take_low(low.reshape(-1, owner.experts, owner.r))
            found[name] = {"low": made[id(owner)]}
    return {name: found.get(name, {}) for name in layers}


def _is_narrow(owner: LoRASwitchLinear, times: int) -> bool:
    """Whether a product of every token with all experts' A takes less than gathered products of its ``times`` rows.

    CUDA's gathered products compute 128 columns, whatever the rank, at a third of the speed of a plain one.
    """
    return on_cuda() and owner.experts * owner.r <= TOKEN_COLUMNS * times


def _product(base: Any) -> Any:
    def call(self: Any, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        trained = self.trainable_parameters() if self.training else {}
        if "bias" in trained:
            out = _gathered(self, x, indices, sorted_indices=sorted_indices)
            return out + look_up(self.bias, indices)[..., None, :]
        if trained or not (self.training and sorted_indices):
            return base.__call__(self, x, indices, sorted_indices=sorted_indices)

        def forward(x: mx.array) -> mx.array:
            if x.shape[-2] == 1:
                return base.__call__(self, x, indices, sorted_indices=True)
            out = matmul(x.astype(self.weight.dtype), pick(self.weight, indices).swapaxes(-1, -2))
            return out + self.bias[indices][:, None] if "bias" in self else out

        product: Any = mx.custom_function(forward)

        @product.vjp
        def backward(x: mx.array, by_out: mx.array, _: Any) -> mx.array:
            # Weights that were picked for the way there would be kept for the way back.
            picked = mx.depends([indices], [by_out])[0] if x.shape[-2] > 1 else indices
            return _gathered(self, by_out, picked, sorted_indices=True, back=True).astype(x.dtype)

        return product(x)

    return type(f"Routed{base.__name__}", (base,), {"__call__": call})


def _gathered(layer: Any, x: mx.array, indices: mx.array, *, sorted_indices: bool, back: bool = False) -> mx.array:
    """Each row times its expert's weight, (N, 1, out), or the way ``back``, (N, 1, in); without bias."""
    options: dict[str, Any] = {"rhs_indices": indices, "sorted_indices": sorted_indices}
    if "scales" not in layer:
        weight = layer.weight if back else layer.weight.swapaxes(-1, -2)
        return gather_mm(x.astype(weight.dtype), weight, **options)
    return mx.gather_qmm(
        x,
        layer.weight,
        layer.scales,
        layer.get("biases"),
        transpose=not back,
        group_size=layer.group_size,
        bits=layer.bits,
        mode=layer.mode,
        global_scale=layer.global_scale,
        **options,
    )
