"""What a training step will need, before it runs, and what there is."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from ..adapters.layers import layer_dims
from ..device import on_cpu, on_cuda
from ..models.heads import Head, layers
from ..models.overrides.recurrent import kept_bytes, working_bytes
from ..settings.plan import TrainPlan
from .blocked_attention import attends_in_blocks, block_queries, is_fused
from .feed_forward import recomputed_inputs
from .kept_attention import keeps_attention, kept_features
from .linear_cross_entropy import block_rows, trained_rows
from .optim import Optimizer
from .step import Step
from .trained import replaces

# The estimate is within this factor of what MLX measures (docs/performance.md).
ACCURACY = 1.5
# float32 copies of logits that are alive together: exponentials, their product, the gradient.
LOGIT_COPIES = 3
# Of a block on a GPU, in the dtype that they are computed in: logits and their gradient.
GPU_LOGIT_COPIES = 2
# Large arrays whose new values are written while the old ones wait for that.
MOVED = 2
# A recomputed block holds its activations, and while it goes back about as much in gradients and products.
RECOMPUTED = 2
# What it holds at once where parts of it are gone when others come, by those; the rest is for what waits on a GPU.
GOING_BACK = 11 / 16
# Of adapters alone, whose pending work goes up to a quarter of a GiB over.
GOING_BACK_ADAPTED = 7 / 8
# Scores and probabilities, where the backward pass of attention is not fused.
ATTENTION_COPIES = 2
# Where it is `cpu_attention`: exponentials, and on the way back what they are made of and its gradients.
CPU_ATTENTION_COPIES = 1, 5


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a training step, by what needs them.

    Attributes:
        weights: All arrays of the model, adapters included.
        optimizer: Its state.
        gradients: One gradient of every trained array.
        activations: What the forward pass keeps for the backward pass.
        recomputed: What one layer holds while it goes back, its recomputed activations included.
        logits: Logits and what is computed from them, of one block of tokens.
        reference: Arrays that a reference holds beside the policy's.
        reference_pass: What its forward pass holds at once, while the policy's activations are kept.
        update: What an update writes while what it replaces is still there.
    """

    weights: int
    optimizer: int
    gradients: int
    activations: int
    recomputed: int
    logits: int
    reference: int = 0
    reference_pass: int = 0
    update: int = 0

    @property
    def temporary(self) -> int:
        """What a step takes and gives back: the backward pass, or the update."""
        backward = self.activations + max(self.logits, self.recomputed + self.gradients, self.reference_pass)
        return max(backward, self.gradients + self.update)

    @property
    def total(self) -> int:
        """The peak: what stays from step to step, and what one of them takes."""
        return self.weights + self.reference + self.optimizer + self.temporary

    @property
    def bound(self) -> int:
        """What a step with checkpointing is held to: less than the total, for MLX goes over it.

        Where gradients outgrow the saved inputs of blocks, those are gone when the last gradients come.
        """
        if self.gradients <= self.activations:
            backward = self.activations + self.gradients + int(GOING_BACK_ADAPTED * self.recomputed)
        else:
            backward = self.gradients + int(GOING_BACK * self.recomputed)
        largest = max(backward, self.gradients + self.update, self.activations + max(self.logits, self.reference_pass))
        return self.total - self.temporary + largest


def estimate(
    model: nn.Module,
    params: Mapping[str, mx.array],
    optimizer: Optimizer,
    plan: TrainPlan,
    *,
    head: Head | None,
    attention_heads: int,
    rows: int,
    tokens: int,
    reference: int | None = None,
) -> MemoryEstimate:
    """The memory of one micro-batch of ``rows`` x ``tokens`` and one update.

    Counts, for each block, the inputs and outputs of its linear layers, of feed-forward networks only those that
    :mod:`~hf_mlx.training.feed_forward` keeps, and the attention matrix where MLX has no fused backward pass for it
    (everywhere but on CUDA in half precision, and there for wide heads) and
    :mod:`~hf_mlx.training.blocked_attention` does not avoid it. Command buffers that wait on a GPU come on top.

    Args:
        model: With adapters attached; its arrays may still be unread files.
        params: What is trained.
        optimizer: Whose state is counted.
        plan: Checkpointing and precision.
        head: The vocabulary projection, or None where the logits are computed in full.
        attention_heads: Query heads of a block.
        rows: Rows of a micro-batch.
        tokens: Padded length of a row.
        reference: Bytes that a reference holds, whose forward pass is part of the step; None where there is none.
    """
    positions = rows * tokens
    weights = _arrays(model)
    stored = max(weights, key=lambda array: array.nbytes).dtype.size
    size = 2 if plan.model.precision.autocast else stored
    dtype = mx.bfloat16 if size == 2 else mx.float32
    scores = size * attention_heads * positions
    copies, back = CPU_ATTENTION_COPIES if on_cpu() and dtype == mx.float32 else (ATTENTION_COPIES, ATTENTION_COPIES)
    scored = [block for block in layers(model) if plan.use_cpu or not is_fused(dtype, _head_width(block))]
    written = {id(block) for block in scored if not attends_in_blocks(block, tokens)}

    def held(block: nn.Module) -> int:
        # A block that has a recurrence has no scores.
        matrix = copies * scores * tokens if id(block) in written else 0
        return positions * size * sum(_features(block)) + (_states(block, rows, tokens) or matrix)

    blocks = [held(block) for block in layers(model)]
    logits = _logit_bytes(model, head, positions, size, params)
    # What one layer takes on its way back, and none keeps: products within chunks, scores of a block of queries.
    kept = sum(blocks) + max(_working(block, rows, tokens) for block in layers(model))
    if len(scored) > len(written):
        recomputed = back * scores * block_queries()
    else:
        recomputed = (back - copies) * scores * tokens if written else 0
    if plan.checkpointing.enabled:
        forgotten = blocks[:: plan.checkpointing.every_n_layers]
        again = layers(model)[:: plan.checkpointing.every_n_layers]
        kept += sum(
            positions * size * kept_features(block)
            for place, block in enumerate(again)
            if keeps_attention(block, place, len(again), tokens) and is_fused(dtype, _head_width(block))
        )
        hidden = Counter(_features(layers(model)[0])).most_common(1)[0][0]
        kept += len(forgotten) * positions * hidden * stored - sum(forgotten)
        recomputed += RECOMPUTED * max(forgotten)
    gradients = _bytes(params.values())
    state = sum(_state_bytes(optimizer, param) for param in params.values())
    return MemoryEstimate(
        weights=_bytes(weights),
        gradients=gradients,
        optimizer=state,
        update=_update_bytes(optimizer, params.values()) if replaces(optimizer, params.values()) else gradients + state,
        activations=kept,
        recomputed=recomputed,
        logits=logits,
        reference=reference or 0,
        reference_pass=0 if reference is None else max(*blocks, logits),
    )


def estimate_step(step: Step, plan: TrainPlan, config: Any, rows: int, tokens: int) -> MemoryEstimate:
    """:func:`estimate` for a micro-batch of a step.

    Args:
        step: Model, parameters and optimizer.
        plan: Checkpointing and precision.
        config: The model's, as transformers has it.
        rows: Rows of the micro-batch.
        tokens: Padded length of a row.
    """
    return estimate(
        step.objective.model,
        step.params,
        step.optimizer,
        plan,
        head=step.objective.head,
        # A model without attention has no heads; one that processes hold together has some of them on each.
        attention_heads=getattr(config.get_text_config(), "num_attention_heads", 0) // plan.model.tensor_parallel,
        rows=rows,
        tokens=tokens,
        reference=getattr(step.objective, "reference_bytes", None),
    )


def memory_limit(backend: Any = mx) -> int:
    """Bytes that MLX may use: its own limit, on Metal what macOS recommends to keep resident, on CUDA what is free.

    ``mx.set_memory_limit`` lowers it.

    Args:
        backend: The module that is asked.
    """
    info, limits = backend.device_info(), [backend.get_memory_limit()]
    if "max_recommended_working_set_size" in info:
        limits.append(info["max_recommended_working_set_size"])
    if "free_memory" in info:
        limits.append(info["free_memory"] + backend.get_active_memory() + backend.get_cache_memory())
    return min(limits)


def planned_limit(backend: Any = mx) -> float:
    """Bytes that an estimate must stay below.

    CUDA says when memory runs out, and the work can be cut then. On Metal and on the CPU the process ends without an
    exception (mlx 0.32.4), so an estimate has to fit with all that it may be wrong by.
    """
    return memory_limit(backend) / (1 if on_cuda(backend) else ACCURACY)


def show_bytes(size: float) -> str:
    """A size for people, in GiB or MiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _features(block: nn.Module) -> list[int]:
    """What a block keeps of every projection, adapted or quantised or not: inputs and outputs, by token."""
    experts = next((module.top_k for module in block.modules() if isinstance(getattr(module, "top_k", None), int)), 1)
    found = []
    recomputed = {id(layer) for module in block.modules() for layer in recomputed_inputs(module)}
    for module in block.modules():
        if isinstance(module, (SwitchLinear, QuantizedSwitchLinear)):
            found += [experts * features for features in layer_dims(module)]
        elif isinstance(module, (nn.Linear, nn.QuantizedLinear)):
            inputs, outputs = layer_dims(module)
            found += [outputs] if id(module) in recomputed else [inputs, outputs]
    return found


def _head_width(block: nn.Module) -> int:
    """Numbers of a head's query, as mlx-lm's attention has it; 0 where it says nothing."""
    widths = (getattr(module, "head_dim", None) for module in block.modules())
    return max((width for width in widths if isinstance(width, int)), default=0)


def _states(block: nn.Module, rows: int, tokens: int) -> int:
    """Bytes of the recurrent states that a block keeps, at the ends of chunks, and of its convolution's outputs."""
    return sum(kept_bytes(module, rows, tokens) for module in block.modules())


def _working(block: nn.Module, rows: int, tokens: int) -> int:
    return sum(working_bytes(module, rows, tokens) for module in block.modules())


def _logit_bytes(model: nn.Module, head: Head | None, positions: int, size: int, params: Mapping[str, mx.array]) -> int:
    if head is None:
        return 0
    module = head.module(model)
    vocabulary = module.get("base_layer", module).weight.shape[0]
    rows = block_rows(positions, vocabulary)
    if on_cpu():
        return LOGIT_COPIES * 4 * vocabulary * rows
    trained = [array for name, array in params.items() if name.startswith(f"{head.path}.")]
    return GPU_LOGIT_COPIES * size * vocabulary * trained_rows(rows, positions, size * vocabulary, trained)


def _state_bytes(optimizer: Optimizer, param: mx.array) -> int:
    return sum(math.prod(shape) for shape in optimizer.slots(param).values()) * optimizer.state_dtype(param).size


def _update_bytes(optimizer: Optimizer, params: Iterable[mx.array]) -> int:
    """What an update, from small arrays to large ones, writes beyond the gradients that it has let go."""
    most = freed = 0
    for param in sorted(params, key=lambda param: param.size):
        most = max(most, MOVED * (param.nbytes + _state_bytes(optimizer, param)) - freed)
        freed += param.nbytes
    return most


def _arrays(model: nn.Module) -> list[mx.array]:
    flat: dict[str, Any] = dict(tree_flatten(model.parameters()))
    return list(flat.values())


def _bytes(arrays: Iterable[mx.array]) -> int:
    return sum(array.nbytes for array in arrays)
