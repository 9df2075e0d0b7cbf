"""What a training step will need, before it runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..adapters.layers import layer_dims
from ..models.heads import Head, layers
from ..settings.plan import TrainPlan
from .linear_cross_entropy import block_rows
from .optim import Optimizer

# float32 copies of a block of logits that are alive together: exponentials, their product, the gradient.
LOGIT_COPIES = 3
# A recomputed block holds its activations and the gradients of about as many.
RECOMPUTED = 2


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a training step, by what needs them.

    Attributes:
        weights: All arrays of the model, adapters included.
        optimizer: Its state.
        gradients: One gradient of every trained array.
        activations: What the forward pass keeps for the backward pass.
        logits: Logits and what is computed from them, of one block of tokens.
    """

    weights: int
    optimizer: int
    gradients: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """The peak: logits and most gradients are not alive at the same time."""
        return self.weights + self.optimizer + self.activations + max(self.logits, self.gradients)


def estimate(
    model: nn.Module,
    params: Mapping[str, mx.array],
    optimizer: Optimizer,
    plan: TrainPlan,
    *,
    head: Head | None,
    rows: int,
    tokens: int,
) -> MemoryEstimate:
    """The memory of one micro-batch of ``rows`` x ``tokens`` and one update.

    Counts, for each block, the inputs and outputs of its linear layers; attention is taken to be fused, so nothing
    grows with the square of the length. Command buffers that wait on a GPU come on top.

    Args:
        model: With adapters attached; its arrays may still be unread files.
        params: What is trained.
        optimizer: Whose state is counted.
        plan: Checkpointing and precision.
        head: The vocabulary projection, or None where the logits are computed in full.
        rows: Rows of a micro-batch.
        tokens: Padded length of a row.
    """
    positions = rows * tokens
    size = 2 if plan.model.precision.autocast else _weight_size(model)
    blocks = [positions * size * sum(map(_features, _linears(block))) for block in layers(model)]
    kept = sum(blocks)
    if plan.checkpointing.enabled:
        every = plan.checkpointing.every_n_layers
        recomputed = [block for index, block in enumerate(blocks) if index % every == 0]
        inputs = positions * _hidden(model) * _weight_size(model)
        kept += len(recomputed) * inputs - sum(recomputed) + RECOMPUTED * max(recomputed)
    return MemoryEstimate(
        weights=_bytes(value for _, value in tree_flatten(model.parameters())),
        optimizer=sum(_state_bytes(optimizer, param) for param in params.values()),
        gradients=_bytes(params.values()),
        activations=kept,
        logits=_logit_bytes(model, head, positions),
    )


def _linears(block: nn.Module) -> list[Any]:
    """Layers of a block that project: those with a two-dimensional weight, whatever wraps or quantises them."""
    wrapped = {id(module["base_layer"]) for module in block.modules() if "base_layer" in module}
    found = [module for module in block.modules() if "base_layer" in module]
    for module in block.modules():
        weight = module.get("weight")
        if weight is not None and weight.ndim >= 2 and id(module) not in wrapped:
            found.append(module)
    return found


def _features(module: Any) -> int:
    return sum(layer_dims(module.get("base_layer", module)))


def _logit_bytes(model: nn.Module, head: Head | None, positions: int) -> int:
    if head is None:
        return 0
    module = head.module(model)
    vocabulary = module.get("base_layer", module).weight.shape[0]
    return LOGIT_COPIES * 4 * vocabulary * block_rows(positions, vocabulary)


def _hidden(model: nn.Module) -> int:
    return min(min(layer_dims(module.get("base_layer", module))) for module in _linears(layers(model)[0])[:1])


def _weight_size(model: nn.Module) -> int:
    floating = [v for _, v in tree_flatten(model.parameters()) if mx.issubdtype(v.dtype, mx.floating)]
    return max(floating, key=lambda value: value.nbytes).dtype.size


def _state_bytes(optimizer: Optimizer, param: mx.array) -> int:
    size = optimizer.state_dtype(param).size
    total = 0
    for shape in optimizer.slots(param).values():
        count = 1
        for length in shape:
            count *= length
        total += count * size
    return total


def _bytes(arrays: Iterable[mx.array]) -> int:
    return sum(array.nbytes for array in arrays)
