"""Gradient checkpointing: blocks forget their activations and recompute them in the backward pass.

The backward pass begins with what blocks have kept and without gradients; it ends with all gradients and nothing else.
Where all weights train the gradients are more, so the last blocks may keep their activations after all.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..models.heads import layers
from ..settings.plan import CheckpointingPlan
from .block_memory import BlockMemory, whole_blocks
from .kept_attention import checkpoint_around_attention, keeps_attention
from .recompute import recompute
from .router import RouterLog


def checkpoint_layers(
    model: nn.Module, plan: CheckpointingPlan, log: RouterLog | None = None, memory: BlockMemory | None = None
) -> None:
    """Make every ``plan.every_n_layers``-th block of ``model`` recompute itself; no number changes.

    The class of each block is left alone: its instances get a subclass.

    Args:
        model: An mlx-lm model.
        plan: Which blocks.
        log: Where the routers inside the blocks record their logits, if they do.
        memory: Of blocks in a micro-batch of any size, by which the last ones stay whole where that does not raise the
            peak; None recomputes all of them.
    """
    if not plan.enabled:
        return
    checkpointed = layers(model)[:: plan.every_n_layers]
    every = _Checkpointing(model, checkpointed, log or RouterLog(), memory)
    for place, layer in enumerate(checkpointed):
        layer.__class__ = _checkpointed(type(layer), every, place)


class _Checkpointing:
    """The blocks that are recomputed."""

    def __init__(self, model: nn.Module, blocks: list[nn.Module], log: RouterLog, memory: BlockMemory | None) -> None:
        self.model, self.blocks, self.log, self.memory = model, blocks, log, memory
        self._whole: dict[tuple[int, ...], int] = {}

    def stays_whole(self, place: int, x: Any) -> bool:
        """Whether the block at ``place`` keeps its activations for the input ``x``, (B, T, D)."""
        if self.memory is None or not isinstance(x, mx.array) or x.ndim != 3:
            return False
        # Every block asks, and to look at all of them takes as long as a part of the trace.
        kind = *x.shape, x.dtype.size
        if kind not in self._whole:
            memory = replace(self.memory, rows=x.shape[0], tokens=x.shape[1])
            self._whole[kind] = whole_blocks(self.model, self.blocks, memory, x.nbytes)
        return place >= len(self.blocks) - self._whole[kind]


def _checkpointed(base: type[nn.Module], every: _Checkpointing, place: int) -> type[nn.Module]:
    log, blocks = every.log, len(every.blocks)

    def call(self: nn.Module, *args, **kwargs):
        def run(params, *args, **kwargs):
            self.update(params)
            with log.recording() as logits:
                output = base.__call__(self, *args, **kwargs)
            return output, logits

        x = args[0] if args else None
        whole = every.stays_whole(place, x)
        for layer in self.modules():
            if hasattr(layer, "casts_again"):
                # In a block that is computed once more a cast does not wait long.
                layer.casts_again = whole  # pyright: ignore[reportAttributeAccessIssue]
        if whole:
            return base.__call__(self, *args, **kwargs)
        # Gradients flow only through explicit arguments, so the parameters must be among them; and only through
        # outputs, so what the routers recorded must be one.
        params = self.trainable_parameters()
        tokens = x.shape[-2] if isinstance(x, mx.array) else 0
        if self.training and keeps_attention(self, place, blocks, tokens):
            output, logits = checkpoint_around_attention(run, params, args, kwargs)
        else:
            output, logits = recompute(run)(params, *args, **kwargs)
        log.add(*logits)
        return output

    return type(f"Checkpointed{base.__name__}", (base,), {"__call__": call})
