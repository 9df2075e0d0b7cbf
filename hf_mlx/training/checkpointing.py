"""Gradient checkpointing: blocks forget their activations and recompute them in the backward pass."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ..models.heads import layers
from ..settings.plan import CheckpointingPlan
from .kept_attention import checkpoint_around_attention, keeps_attention
from .recompute import recompute
from .router import RouterLog


def checkpoint_layers(model: nn.Module, plan: CheckpointingPlan, log: RouterLog | None = None) -> None:
    """Make every ``plan.every_n_layers``-th block of ``model`` recompute itself; no number changes.

    The class of each block is left alone: its instances get a subclass.

    Args:
        model: An mlx-lm model.
        plan: Which blocks.
        log: Where the routers inside the blocks record their logits, if they do.
    """
    if not plan.enabled:
        return
    log = log or RouterLog()
    checkpointed = layers(model)[:: plan.every_n_layers]
    for place, layer in enumerate(checkpointed):
        layer.__class__ = _checkpointed(type(layer), log, place, len(checkpointed))


def _checkpointed(base: type[nn.Module], log: RouterLog, place: int, blocks: int) -> type[nn.Module]:
    def call(self: nn.Module, *args, **kwargs):
        def run(params, *args, **kwargs):
            self.update(params)
            with log.recording() as logits:
                output = base.__call__(self, *args, **kwargs)
            return output, logits

        # Gradients flow only through explicit arguments, so the parameters must be among them; and only through
        # outputs, so what the routers recorded must be one.
        params = self.trainable_parameters()
        tokens = args[0].shape[-2] if args and isinstance(args[0], mx.array) else 0
        if self.training and keeps_attention(self, place, blocks, tokens):
            output, logits = checkpoint_around_attention(run, params, args, kwargs)
        else:
            output, logits = recompute(run)(params, *args, **kwargs)
        log.add(*logits)
        return output

    return type(f"Checkpointed{base.__name__}", (base,), {"__call__": call})
