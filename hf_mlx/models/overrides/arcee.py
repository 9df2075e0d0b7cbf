"""Arcee: a Llama whose MLP has no gate.

Source: transformers 5.23 ``modeling_arcee``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama

from .activations import ACTIVATIONS
from .llama import blocks_of


@dataclass
class ModelArgs(llama.ModelArgs):
    """mlx-lm's, and the activation."""

    hidden_act: str = "relu2"


class MLP(nn.Module):
    """down(act(up(x)))."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.up_proj = nn.Linear(args.hidden_size, args.intermediate_size, bias=args.mlp_bias)
        self.down_proj = nn.Linear(args.intermediate_size, args.hidden_size, bias=args.mlp_bias)
        self.activation = args.hidden_act

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(ACTIVATIONS[self.activation](self.up_proj(x)))


class Model(llama.Model):
    """mlx-lm's Llama with Arcee's MLP."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args)
        for block in blocks_of(self):
            block.mlp = MLP(args)


def classes() -> tuple[type[Any], type]:
    """What builds it."""
    return Model, ModelArgs
