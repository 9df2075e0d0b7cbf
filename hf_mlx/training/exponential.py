"""The exponential of a softmax over a vocabulary."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..device import on_cpu

# Cephes expf: exp(x) = 2^k exp(r), with r = x - k ln 2 in two parts of ln 2, and a polynomial for exp(r).
_LOG2_E = 1.44269504088896341
_LN2 = (0.693359375, -2.12194440e-4)
_COEFFICIENTS = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
# Below it 2^k is no normal number.
_LOWEST = -87.0
_EXPONENT_BIAS, _MANTISSA_BITS = 127, 23


def exponential(x: mx.array) -> mx.array:
    """exp(x) of numbers that are not positive, float32.

    MLX's kernel on the CPU takes 20 ns a number and is up to 4e-6 off (mlx 0.32.4); written out in operations that
    its compiler makes one loop of, it takes 7 ns and is 1e-7 off. Numbers below -87 count as -87.

    Args:
        x: float32, <= 0; NaN stays NaN.
    """
    if not on_cpu():
        return mx.exp(x)
    function: Any = mx.custom_function(_expand)
    function.vjp(lambda _, cotangent, output: cotangent * output)
    return function(x)


def _expand(x: mx.array) -> mx.array:
    x = mx.maximum(x, _LOWEST)
    k = mx.floor(x * _LOG2_E + 0.5)
    r = x - k * _LN2[0] - k * _LN2[1]
    polynomial = mx.array(_COEFFICIENTS[0])
    for coefficient in _COEFFICIENTS[1:]:
        polynomial = polynomial * r + coefficient
    exponent = mx.left_shift(k.astype(mx.int32) + _EXPONENT_BIAS, _MANTISSA_BITS)
    return (polynomial * r * r + r + 1) * exponent.view(mx.float32)
