"""MLPs that compute the activation their config names, where mlx-lm's code has one built in."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama

from ..activation_rounding import gelu, gelu_new, gelu_tanh, round_as_torch, silu

Config = dict[str, Any]
Activation = Callable[[mx.array], mx.array]

# transformers 5.23 activations.ACT2FN: name → the same function in MLX.
ACTIVATIONS: dict[str, Activation] = {
    "gelu": gelu,
    "gelu_new": gelu_new,
    "gelu_fast": gelu_new,
    "gelu_pytorch_tanh": gelu_tanh,
    "quick_gelu": nn.gelu_fast_approx,
    "silu": silu,
    "swish": silu,
    "relu": nn.relu,
    "relu2": lambda x: mx.square(nn.relu(x)),
    "tanh": mx.tanh,
    "sigmoid": mx.sigmoid,
}


def configured(config: Config) -> str:
    """The activation's HF name: Gemma's ``hidden_activation`` decides over ``hidden_act``."""
    for key in ("hidden_activation", "hidden_act", "activation_function"):
        if config.get(key) is not None:
            return config[key]
    return "gelu_pytorch_tanh" if config["model_type"].startswith("gemma") else "silu"


def use_configured(model: Any, config: Config) -> None:
    """Gives each block's MLP the activation of the config."""
    name = configured(config)
    if name in ("silu", "swish") and all(isinstance(block.mlp, llama.MLP) for block in model.layers):
        return  # built in
    for block in model.layers:
        block.mlp.__class__ = _activated(type(block.mlp))
        block.mlp.activation = name


def round_as_configured(model: Any, config: Config) -> None:
    """Rounds every activation where torch does, Gaussian ones as the one of the config."""
    round_as_torch(model, configured(config.get("text_config") or config))


@cache
def _activated(mlp: type[Any]) -> type[Any]:
    class Activated(mlp):
        def __call__(self, x: mx.array) -> mx.array:
            act = ACTIVATIONS[self.activation]
            if "gate_proj" in self:
                return self.down_proj(act(self.gate_proj(x)) * self.up_proj(x))
            if "c_fc" in self:
                return self.c_proj(act(self.c_fc(x)))
            return self.dense_4h_to_h(act(self.dense_h_to_4h(x)))

    Activated.__name__ = f"Activated{mlp.__name__}"
    return Activated


def clamp_as_configured(model: Any, config: dict[str, Any]) -> None:
    """gpt-oss: the gate's slope and the limit of both halves are the config's, where mlx-lm keeps 1.702 and 7."""
    for block in model.layers:
        activation = block.mlp.experts.activation
        activation._alpha = config.get("swiglu_alpha", 1.702)
        activation._limit = config.get("swiglu_limit", 7.0)
