"""Matrix products in half precision that are as fast as the backend can be, with the same numbers everywhere.

GPUs multiply bf16 with an fp32 accumulator and round once. MLX's CPU backend does the same about 15 times slower than
its fp32 products, which are the BLAS library's, and has no gathered product in half precision (mlx 0.32.4). A product
of two bf16 numbers is exact in fp32, so on the CPU the operands are widened and the result is rounded once. The
gradients go the same way, since the derivative of a cast is a cast.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..device import on_cpu

_HALF = (mx.bfloat16, mx.float16)


def matmul(a: mx.array, b: mx.array) -> mx.array:
    """``a @ b``, for two arrays of one dtype.

    Args:
        a: (..., M, K).
        b: (..., K, N), in the dtype of ``a``.

    Returns:
        (..., M, N), in the dtype of ``a``.
    """
    if not widens(a):
        return a @ b
    return (a.astype(mx.float32) @ b.astype(mx.float32)).astype(a.dtype)


def addmm(c: mx.array, a: mx.array, b: mx.array) -> mx.array:
    """``c + a @ b``, rounded once, for three arrays of one dtype.

    Args:
        c: Broadcasts to (..., M, N).
        a: (..., M, K).
        b: (..., K, N).

    Returns:
        (..., M, N), in the dtype of ``a``.
    """
    if not widens(a):
        return mx.addmm(c, a, b)
    return mx.addmm(c.astype(mx.float32), a.astype(mx.float32), b.astype(mx.float32)).astype(a.dtype)


def gather_mm(a: mx.array, b: mx.array, **options: Any) -> mx.array:
    """``mx.gather_mm``, for two arrays of one dtype.

    Args:
        a: (..., M, K).
        b: (E, K, N), in the dtype of ``a``.
        options: Which matrices to multiply, as ``mx.gather_mm`` takes it.
    """
    if not widens(a):
        return mx.gather_mm(a, b, **options)
    return mx.gather_mm(a.astype(mx.float32), b.astype(mx.float32), **options).astype(a.dtype)


def widens(a: mx.array) -> bool:
    """Whether what is computed from ``a`` goes through fp32 here: half precision on the CPU backend."""
    return a.dtype in _HALF and on_cpu()
