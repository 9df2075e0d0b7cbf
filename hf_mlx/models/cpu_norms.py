"""Norms on MLX's CPU backend, as exact as torch's, forward and backward.

MLX's own add up the squares of a token one after the other: at 4,096 features a norm is 4.8e-7 off and torch's 5.8e-8,
and the gradient of a weight, which is a sum over all tokens, 3e-7 and 1e-7 (mlx 0.32.4, torch 2.13). Its kernels for
GPUs add in trees, and are used there.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..device import on_cpu
from .sums import add_bias, blocked_sum, sum_rows

#: Features from which MLX's sums are much further from exact than torch's; at 64 they are 1.4 times as far.
LEAST = 256


def add_exactly(model: nn.Module) -> None:
    """Make the plain RMSNorms and LayerNorms of ``model`` the ones of this module, in place."""
    for module in model.modules():
        if type(module) in (nn.RMSNorm, nn.LayerNorm):
            module.__class__ = _exact(type(module))


@cache
def _exact(norm: type[Any]) -> type[Any]:
    class Exact(norm):
        def __call__(self, x: mx.array) -> mx.array:
            if norm is nn.RMSNorm:
                return rms_norm(x, self.get("weight"), self.eps)
            return layer_norm(x, self.get("weight"), self.get("bias"), self.eps)

    # What error messages call it.
    Exact.__name__ = norm.__name__
    return Exact


def rms_norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
    """``mx.fast.rms_norm``; of many features on the CPU and in float32 up to the order of sums."""
    if not _is_ours(x, weight):
        return mx.fast.rms_norm(x, weight, eps)
    return _norm(x, weight, eps, centred=False)


def layer_norm(x: mx.array, weight: mx.array | None, bias: mx.array | None, eps: float) -> mx.array:
    """``mx.fast.layer_norm``; of many features on the CPU and in float32 up to the order of sums."""
    if not _is_ours(x, weight, bias):
        return mx.fast.layer_norm(x, weight, bias, eps)
    normed = _norm(x, weight, eps, centred=True)
    return normed if bias is None else add_bias(normed, bias)


def _is_ours(x: mx.array, *others: mx.array | None) -> bool:
    floats = all(array is None or array.dtype == mx.float32 for array in (x, *others))
    return on_cpu() and floats and x.shape[-1] >= LEAST


def _norm(x: mx.array, weight: mx.array | None, eps: float, *, centred: bool) -> mx.array:
    def forward(x: mx.array, *weight: mx.array) -> tuple[mx.array, ...]:
        centre = [_mean(x)] if centred else []
        x = x - centre[0] if centred else x
        scale = mx.rsqrt(_mean(x * x) + eps)
        unit = x * scale
        return unit * weight[0] if weight else unit, scale, *centre

    def backward(primals: Any, cotangents: Any, outputs: Any) -> Any:
        # MLX hands over a single primal as it is.
        x, *weight = [primals] if isinstance(primals, mx.array) else primals
        by_output, (_, scale, *centre) = cotangents[0], outputs
        unit = (x - centre[0] if centred else x) * scale
        by_unit = by_output * weight[0] if weight else by_output
        by_x = by_unit - unit * _mean(by_unit * unit)
        if centred:
            by_x = by_x - _mean(by_unit)
        by_x = by_x * scale
        return (by_x, sum_rows(by_output * unit)) if weight else by_x

    normed: Any = mx.custom_function(forward)
    normed.vjp(backward)
    return normed(x, *([] if weight is None else [weight]))[0]


def _mean(x: mx.array) -> mx.array:
    return blocked_sum(x)[..., None] / x.shape[-1]
