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

from ..device import on_cpu, on_cuda
from ..models.heads import Head, layers
from ..settings.plan import TrainPlan
from .block_memory import GOING_BACK, BlockMemory, whole_blocks
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
# Of adapters alone, whose pending work goes up to a quarter of a GiB over.
GOING_BACK_ADAPTED = 7 / 8


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
        kept_whole: Of the activations, those of blocks that checkpointing leaves whole; gone at the end.
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
    kept_whole: int = 0

    @property
    def temporary(self) -> int:
        """What a step takes and gives back: the backward pass, or the update."""
        begin = self.activations + max(self.logits, self.reference_pass)
        end = self.activations - self.kept_whole + self.recomputed + self.gradients
        return max(begin, end, self.gradients + self.update)

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
    weights, every, whole = _arrays(model), layers(model), []
    memory = BlockMemory.of(model, plan, heads=attention_heads, rows=rows, tokens=tokens)
    logits = _logit_bytes(model, head, positions, memory.size, params)
    kept, working = sum(map(memory.held, every)), max(map(memory.working, every))
    recomputed = max(map(memory.scores_going_back, every))
    if plan.checkpointing.enabled:
        again = every[:: plan.checkpointing.every_n_layers]
        hidden = Counter(memory.features(every[0])).most_common(1)[0][0]
        inputs = positions * hidden * memory.stored
        whole = again[len(again) - whole_blocks(model, again, memory, inputs) :]
        computed_again = again[: len(again) - len(whole)]
        kept += len(computed_again) * inputs - sum(map(memory.held, computed_again))
        kept += sum(memory.attention(block, place, len(again)) for place, block in enumerate(computed_again))
        recomputed = max([recomputed + working, *map(memory.going_back, computed_again)])
    else:
        kept += working
    gradients = _bytes(params.values())
    state = sum(_state_bytes(optimizer, param) for param in params.values())
    return MemoryEstimate(
        weights=_bytes(weights),
        gradients=gradients,
        optimizer=state,
        update=_update_bytes(optimizer, params.values()) if replaces(optimizer, params.values()) else gradients + state,
        activations=kept,
        kept_whole=sum(map(memory.held, whole)),
        recomputed=recomputed,
        logits=logits,
        reference=reference or 0,
        reference_pass=0 if reference is None else max(*map(memory.held, every), logits),
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
