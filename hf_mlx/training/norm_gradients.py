"""Gradients of norms on a GPU: of a weight only where it trains, and added up in float32.

MLX's kernels give the gradients of a norm's input and of its weight together (mlx 0.32.4, ``RMSNormVJP``,
``LayerNormVJP``): where the weight is frozen they write an array as large as the input and add up its columns for
nothing. Of gemma3-1b, whose blocks have six norms of 1,152 and 256 numbers, that is 15 ms of the 165 that a step of
8,192 tokens keeps an H200 busy. And in half precision the columns are added up in half precision: over 8,192 tokens the
gradient is 2e-2 off where torch's is 4e-3.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from types import FunctionType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..device import on_cpu, on_cuda
from ..models import cpu_norms
from ..models.rebinding import Changed, calls, rebound, with_methods
from ..models.sums import sum_rows


def improve_norms(model: nn.Module) -> None:
    """Make the norms of ``model`` compute their gradients as this module does, in place.

    A norm is recognised by its code, which calls ``mx.fast.rms_norm`` or ``mx.fast.layer_norm``. The instances get a
    subclass. On the CPU, where what nothing reads is not computed, all stays as it is.

    Args:
        model: With its trainable parameters chosen.
    """
    if on_cpu():
        return
    for module in model.modules():
        if module.parameters() and not module.children():
            kind = _improved(type(module), bool(module.trainable_parameters()))
            if kind is not None:
                module.__class__ = kind


def rms_norm(x: mx.array, weight: mx.array | None, eps: float, *, trains: bool) -> mx.array:
    """``mx.fast.rms_norm``.

    Args:
        x: (..., D).
        weight: (D,), or None.
        eps: Added to the mean of squares.
        trains: Differentiable in ``weight`` too.
    """
    at_once = partial(mx.fast.rms_norm, eps=eps)
    if weight is None or weight.dtype != x.dtype or _adds_up_itself(x):
        return at_once(x, weight)
    return _norm(lambda x: at_once(x, None), at_once, x, [weight], trains)


def layer_norm(x: mx.array, weight: mx.array | None, bias: mx.array | None, eps: float, *, trains: bool) -> mx.array:
    """``mx.fast.layer_norm``.

    Args:
        x: (..., D).
        weight: (D,), or None.
        bias: (D,), or None.
        eps: Added to the variance.
        trains: Differentiable in ``weight`` and ``bias`` too.
    """
    at_once = partial(mx.fast.layer_norm, eps=eps)
    params = [weight] if bias is None else [weight, bias]
    if any(param is None or param.dtype != x.dtype for param in params):
        return at_once(x, weight, bias)
    return _norm(lambda x: at_once(x, None, None), lambda x, w, b=None: at_once(x, w, b), x, params, trains)


def _norm(
    plain: Callable[[mx.array], mx.array], whole: Callable[..., mx.array], x: mx.array, params: Any, trains: bool
) -> mx.array:
    """``whole(x, *params)``, which is ``plain(x) * weight + bias`` for those params."""

    def by_input(x: mx.array, by_out: mx.array, weight: mx.array) -> mx.array:
        return mx.vjp(plain, [x], [by_out * weight])[1][0]

    if not trains:
        norm: Any = mx.custom_function(lambda x: whole(x, *params))
        norm.vjp(lambda x, by_out, _: by_input(x, by_out, params[0]))
        return norm(x)
    if x.dtype == mx.float32:
        return whole(x, *params)

    def backward(primals: Any, by_out: mx.array, _: mx.array) -> tuple[mx.array, ...]:
        x, weight, *bias = primals
        return by_input(x, by_out, weight), sum_rows(by_out * plain(x)), *(sum_rows(by_out) for _ in bias)

    norm = mx.custom_function(whole)
    norm.vjp(backward)
    return norm(x, *params)


def _adds_up_itself(x: mx.array) -> bool:
    """Whether MLX's kernel adds the weight's gradient up as it goes: in float32, and it costs next to nothing.

    Source: mlx 0.32.4, backend/cuda/rms_norm.cu, ``use_rmsnorm_vjp_fast``.
    """
    chunk, width = 1024 // x.dtype.size, x.shape[-1]
    return on_cuda() and any(width % step == 0 and width <= 8 * step for step in (chunk, 2 * chunk))


@cache
def _improved(kind: type[Any], trains: bool) -> type[Any] | None:
    ours = {"rms_norm": partial(rms_norm, trains=trains), "layer_norm": partial(layer_norm, trains=trains)}
    return with_methods(kind, lambda method: _replaced(method, ours))


def _replaced(method: FunctionType, ours: dict[str, Any]) -> Any:
    fast = Changed(mx.fast, **ours)
    if calls(method, "mx", mx) and fast.is_named_in(method):
        return rebound(method, "mx", Changed(mx, fast=fast))
    for name, function in ours.items():
        if calls(method, name, getattr(cpu_norms, name)):
            method = rebound(method, name, function)
    return method
