"""The exponential of a softmax over a vocabulary."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..device import on_cpu

# Cephes expf: exp(x) = 2^k exp(r), with r = x - k ln 2 in two parts of ln 2, and a polynomial for exp(r).
_LOG2_E = 1.44269504088896341
_LN2 = (0.693359375, -2.12194440e-4)
_COEFFICIENTS = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
# Its k is -127, and the exponent's bits of 2^k are then those of zero.
_LOWEST = -88.0
_EXPONENT_BIAS, _MANTISSA_BITS = 127, 23
# Added and taken away it rounds to a whole number: floor is a call of libm for each number, which keeps a loop scalar.
_ROUNDING = 1.5 * 2.0**_MANTISSA_BITS


def exponential(x: mx.array) -> mx.array:
    """exp(x) of numbers that are not positive, float32.

    MLX's kernel on the CPU takes 15 to 20 ns a number and is up to 4e-6 off (mlx 0.32.4); written out in operations
    that its compiler makes vectorised loops of, it takes 2 ns and is 1.2e-7 off. What is no normal number is zero.

    Args:
        x: float32, <= 0; NaN stays NaN.
    """
    if not on_cpu():
        return mx.exp(x)
    function: Any = mx.custom_function(_expand)
    function.vjp(lambda _, cotangent, output: cotangent * output)
    return function(x)


def sigmoid(x: mx.array) -> mx.array:
    """1 / (1 + exp(-x)), with :func:`exponential`.

    Args:
        x: float32.
    """
    function: Any = mx.custom_function(_sigmoid)
    function.vjp(lambda _, cotangent, output: cotangent * (output * (1 - output)))
    return function(x)


def _sigmoid(x: mx.array) -> mx.array:
    small = exponential(-mx.abs(x))
    return mx.where(x < 0, small, 1.0) / (1 + small)


def _expand(x: mx.array) -> mx.array:
    x = mx.maximum(x, _LOWEST)
    k = (x * _LOG2_E + _ROUNDING) - _ROUNDING
    r = x - k * _LN2[0] - k * _LN2[1]
    square, c = r * r, _COEFFICIENTS
    # In pairs: MLX's compiler takes a chain of eleven operations into a loop.
    polynomial = ((c[0] * r + c[1]) * square + (c[2] * r + c[3])) * square + (c[4] * r + c[5])
    exponent = mx.left_shift(k.astype(mx.int32) + _EXPONENT_BIAS, _MANTISSA_BITS)
    return (polynomial * square + (r + 1)) * exponent.view(mx.float32)
