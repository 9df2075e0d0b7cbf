"""Activations in half precision, rounded where torch rounds: once, behind float32.

MLX's own round after each operation (mlx 0.32.4): of ``silu(gate) * up`` in bf16 three of four numbers are those of
torch, and half of the gradient's; with these all are. ``nn.gelu_approx`` takes x³ as a power besides, for which a GPU
needs longer than for reading and writing the array.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import cache, partial
from types import FunctionType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.activations import swiglu

from .rebinding import Changed, calls, rebound, with_methods

_SLOPE, _CUBIC = math.sqrt(2 / math.pi), 0.044715


@partial(mx.compile, shapeless=True)
def silu(x: mx.array) -> mx.array:
    """torch's ``silu``."""
    wide = x.astype(mx.float32)
    return (wide * mx.sigmoid(wide)).astype(x.dtype)


@partial(mx.compile, shapeless=True)
def silu_product(gate: mx.array, x: mx.array) -> mx.array:
    """torch's ``silu(gate) * x``."""
    return silu(gate) * x


@partial(mx.compile, shapeless=True)
def gelu(x: mx.array) -> mx.array:
    """torch's ``gelu``."""
    wide = x.astype(mx.float32)
    return (wide * (1 + mx.erf(wide / math.sqrt(2))) / 2).astype(x.dtype)


@partial(mx.compile, shapeless=True)
def gelu_tanh(x: mx.array) -> mx.array:
    """torch's ``gelu(x, approximate="tanh")``.

    Source: torch 2.13, aten/src/ATen/native/cuda/ActivationGeluKernel.cu, ``GeluCUDAKernelImpl``.
    """
    wide = x.astype(mx.float32)
    inner = _SLOPE * (wide + _CUBIC * (wide * wide * wide))
    return (0.5 * wide * (1 + mx.tanh(inner))).astype(x.dtype)


@partial(mx.compile, shapeless=True)
def gelu_new(x: mx.array) -> mx.array:
    """transformers 5.23 ``NewGELUActivation``, which rounds after each operation; a cube is one."""
    wide = x.astype(mx.float32)
    cube = (wide * wide * wide).astype(x.dtype)
    return 0.5 * x * (1 + mx.tanh(_SLOPE * (x + _CUBIC * cube)))


def round_as_torch(model: nn.Module, name: str) -> None:
    """Make the parts of ``model`` whose code calls mlx's activations call these, in place.

    Args:
        model: An mlx-lm model.
        name: What transformers calls the activation for which mlx-lm has ``nn.gelu_approx``.
    """
    approximate = gelu_tanh if name == "gelu_pytorch_tanh" else gelu_new
    for module in model.modules():
        kind = _rounding(type(module), approximate)
        if kind is not None:
            module.__class__ = kind


@cache
def _rounding(kind: type[Any], approximate: Callable[[mx.array], mx.array]) -> type[Any] | None:
    return with_methods(kind, lambda method: _replaced(method, approximate))


def _replaced(method: FunctionType, approximate: Callable[[mx.array], mx.array]) -> Any:
    layers = Changed(nn, silu=silu, gelu=gelu, gelu_approx=approximate)
    if calls(method, "nn", nn) and layers.is_named_in(method):
        return rebound(method, "nn", layers)
    if calls(method, "swiglu", swiglu):
        return rebound(method, "swiglu", silu_product)
    # Gemma 4's own, of one module.
    gated = getattr(sys.modules.get("mlx_lm.models.gemma4_text"), "geglu", None)
    if gated is not None and calls(method, "geglu", gated):
        return rebound(method, "geglu", lambda gate, x: approximate(gate) * x)
    return method
