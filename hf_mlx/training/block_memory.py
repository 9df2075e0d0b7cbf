"""What a block of a model takes while it is trained, before it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from ..adapters.layers import layer_dims
from ..device import on_cpu
from ..models.heads import layers, trained_arrays
from ..models.overrides.recurrent import kept_bytes, working_bytes
from ..settings.plan import TrainPlan
from .blocked_attention import attends_in_blocks, block_queries, is_fused
from .feed_forward import recomputed_inputs
from .kept_attention import keeps_attention, kept_features
from .routed_experts import copied_bytes

# A recomputed block holds its activations, and while it goes back about as much in gradients and products.
RECOMPUTED = 2
# For each number of a trained head, beside its gradient, while the loss goes back: sums in float32, logits and theirs.
# Counted on a CPU.
HEAD_BYTES = 12
# What a block holds at once where parts of it are gone when others come, by those. On a GPU what waits comes on top.
GOING_BACK = 1 / 2
# Scores and probabilities, where the backward pass of attention is not fused.
ATTENTION_COPIES = 2
# Where it is `cpu_attention`: exponentials, and on the way back what they are made of and its gradients.
CPU_ATTENTION_COPIES = 1, 5


@dataclass(frozen=True)
class BlockMemory:
    """Bytes of blocks in one micro-batch.

    Attributes:
        rows, tokens: The micro-batch's.
        stored: Bytes of a number of the largest array.
        size: Bytes of a number that is computed.
        dtype: Of those numbers, as attention sees it.
        heads: Query heads of a block.
        fused: Whether the device may have a fused backward pass of attention.
    """

    rows: int
    tokens: int
    stored: int
    size: int
    dtype: mx.Dtype
    heads: int
    fused: bool

    @classmethod
    def of(cls, model: nn.Module, plan: TrainPlan, *, heads: int = 0, rows: int = 0, tokens: int = 0) -> BlockMemory:
        """For a model under ``plan``."""
        arrays: Any = tree_flatten(model.parameters())
        stored = max((array for _, array in arrays), key=lambda array: array.nbytes).dtype.size
        size = 2 if plan.model.precision.autocast else stored
        return cls(rows, tokens, stored, size, mx.bfloat16 if size == 2 else mx.float32, heads, not plan.use_cpu)

    @property
    def positions(self) -> int:
        """Tokens of the micro-batch."""
        return self.rows * self.tokens

    def held(self, block: nn.Module) -> int:
        """What the forward pass keeps: of projections, and recurrent states or scores."""
        copies, _ = self._copies()
        scores = copies * self._scores() * self.tokens if self.writes_scores(block) else 0
        return self.positions * self.size * sum(self.features(block)) + self._states(block) + scores

    def working(self, block: nn.Module) -> int:
        """What it takes on its way back, and does not keep: products within chunks, copied weights."""
        choices = self.positions * _choices(block)
        modules = block.modules()
        return sum(working_bytes(part, self.rows, self.tokens) + copied_bytes(part, choices) for part in modules)

    def scores_going_back(self, block: nn.Module) -> int:
        """Scores of attention on the way back beyond those that were kept."""
        copies, back = self._copies()
        if self.writes_scores(block):
            return (back - copies) * self._scores() * self.tokens
        queries = block_queries(self.heads * self.positions)
        return back * self._scores() * queries if self._has_scores(block) else 0

    def going_back(self, block: nn.Module) -> int:
        """What a block that is computed once more takes in all."""
        copies, back = self._copies()
        going = RECOMPUTED * self.held(block) + self.working(block)
        if self.writes_scores(block):
            # In all as many as there were without, or twice what was kept.
            return going + max(back - RECOMPUTED * copies, 0) * self._scores() * self.tokens
        return going + self.scores_going_back(block)

    def attention(self, block: nn.Module, place: int, count: int) -> int:
        """What a block, at ``place`` among ``count`` that are computed once more, keeps of attention all the same."""
        if not keeps_attention(block, place, count, self.tokens) or not is_fused(self.dtype, _head_width(block)):
            return 0
        return self.positions * self.size * kept_features(block)

    def features(self, block: nn.Module) -> list[int]:
        """What it keeps of every projection, adapted or quantised or not: inputs and outputs, by token."""
        experts = _choices(block)
        found = []
        recomputed = {id(layer) for module in block.modules() for layer in recomputed_inputs(module)}
        for module in block.modules():
            if isinstance(module, (SwitchLinear, QuantizedSwitchLinear)):
                found += [experts * features for features in layer_dims(module)]
            elif isinstance(module, (nn.Linear, nn.QuantizedLinear)):
                inputs, outputs = layer_dims(module)
                found += [outputs] if id(module) in recomputed else [inputs, outputs]
        return found

    def _copies(self) -> tuple[int, int]:
        if on_cpu() and self.dtype == mx.float32:
            return CPU_ATTENTION_COPIES
        return ATTENTION_COPIES, ATTENTION_COPIES

    def _scores(self) -> int:
        """Bytes of the scores of one key."""
        return self.size * self.heads * self.positions

    def _states(self, block: nn.Module) -> int:
        """Recurrent states that it keeps, at the ends of chunks, and its convolution's outputs."""
        return sum(kept_bytes(module, self.rows, self.tokens) for module in block.modules())

    def _has_scores(self, block: nn.Module) -> bool:
        # A block that has a recurrence has none.
        return not (self.fused and is_fused(self.dtype, _head_width(block))) and not self._states(block)

    def writes_scores(self, block: nn.Module) -> bool:
        """Whether attention keeps a matrix of all pairs of tokens."""
        return self._has_scores(block) and not attends_in_blocks(block, self.tokens)


def whole_blocks(model: nn.Module, blocks: Sequence[nn.Module], memory: BlockMemory, inputs: int) -> int:
    """How many of the last blocks need not be computed once more: what they keep is gone when all gradients are there.

    Args:
        model: Whose blocks they are.
        blocks: Those with checkpointing, in their order; where others lie between them all are computed once more.
        memory: Of a micro-batch; blocks that keep scores are not counted, and all are computed once more.
        inputs: Bytes of a block's input, of which each keeps one.
    """
    if len(blocks) < len(layers(model)) or any(memory.writes_scores(block) for block in blocks):
        return 0
    inner = {id(array) for block in blocks for array in trained_arrays(block).values()}
    every = trained_arrays(model).values()
    outer = [array for array in every if id(array) not in inner]
    gradients, saved = sum(array.nbytes for array in every), len(blocks) * inputs
    if not outer or gradients <= saved:
        return 0
    # The gradients of head and embedding are there first.
    begin = saved + sum(array.nbytes for array in outer) + HEAD_BYTES * max(array.size for array in outer)
    end = gradients + int(GOING_BACK * max(map(memory.going_back, blocks)))
    # Beside what linear layers keep, what its two norms read and attention behind the rotary embeddings.
    attention = memory.positions * memory.size * max(map(kept_features, blocks))
    held = max(map(memory.held, blocks)) + 2 * inputs + attention
    return min(max((end - begin) // held, 0), len(blocks))


def _choices(block: nn.Module) -> int:
    """Experts of each token."""
    return next((module.top_k for module in block.modules() if isinstance(getattr(module, "top_k", None), int)), 1)


def _head_width(block: nn.Module) -> int:
    """Numbers of a head's query, as mlx-lm's attention has it; 0 where it says nothing."""
    widths = (getattr(module, "head_dim", None) for module in block.modules())
    return max((width for width in widths if isinstance(width, int)), default=0)
