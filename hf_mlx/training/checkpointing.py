"""Gradient checkpointing: blocks forget their activations and recompute them in the backward pass."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ..models.heads import layers
from ..settings.plan import CheckpointingPlan


def checkpoint_layers(model: nn.Module, plan: CheckpointingPlan) -> None:
    """Make every ``plan.every_n_layers``-th block of ``model`` recompute itself; no number changes.

    The class of each block is left alone: its instances get a subclass.
    """
    if not plan.enabled:
        return
    for index, layer in enumerate(layers(model)):
        if index % plan.every_n_layers == 0:
            layer.__class__ = _checkpointed(type(layer))


def _checkpointed(base: type[nn.Module]) -> type[nn.Module]:
    def call(self: nn.Module, *args, **kwargs):
        def run(params, *args, **kwargs):
            self.update(params)
            return base.__call__(self, *args, **kwargs)

        # Gradients flow only through explicit arguments, so the parameters must be among them.
        return mx.checkpoint(run)(self.trainable_parameters(), *args, **kwargs)

    return type(f"Checkpointed{base.__name__}", (base,), {"__call__": call})
