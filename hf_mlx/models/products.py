"""Matrix products in half precision that are as fast as the backend can be, with the same numbers everywhere.

GPUs multiply bf16 with an fp32 accumulator and round once. MLX's CPU backend does the same about 15 times slower than
its fp32 products, which are the BLAS library's, and has no gathered product in half precision (mlx 0.32.4). A product
of two bf16 numbers is exact in fp32, so on the CPU the operands are widened and the result is rounded once. The
gradients go the same way, since the derivative of a cast is a cast.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx

from ..device import on_cpu

HALF = (mx.bfloat16, mx.float16)


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


def addmm(c: mx.array, a: mx.array, b: mx.array, scale: float = 1.0) -> mx.array:
    """``c + scale * (a @ b)``, rounded once, for three arrays of one dtype.

    Args:
        c: Broadcasts to (..., M, N).
        a: (..., M, K).
        b: (..., K, N).
        scale: Multiplied in where the product is summed up, in fp32.

    Returns:
        (..., M, N), in the dtype of ``a``.
    """
    if not widens(a):
        return mx.addmm(c, a, b, scale)
    return mx.addmm(c.astype(mx.float32), a.astype(mx.float32), b.astype(mx.float32), scale).astype(a.dtype)


def scaled_matmul(a: mx.array, b: mx.array, scale: float) -> mx.array:
    """``scale * (a @ b)``, rounded once, for two matrices of one dtype; no pass of its own over the result."""
    return matmul(a, b) if scale == 1.0 else addmm(_zeros(b.shape[-1], a.dtype), a, b, scale)


@cache
def _zeros(count: int, dtype: mx.Dtype) -> mx.array:
    # From data, so that a trace holds it as a constant.
    return mx.array([0.0] * count, dtype)


def gather_mm(a: mx.array, b: mx.array, **options: Any) -> mx.array:
    """``mx.gather_mm``, for two arrays of one dtype.

    Args:
        a: (..., M, K). Where M is more than 1, the matrices of ``b`` are picked first, for one batched product.
        b: (E, K, N), in the dtype of ``a``.
        options: Which matrices to multiply, as ``mx.gather_mm`` takes it.
    """
    if a.shape[-2] > 1 and "lhs_indices" not in options:
        return matmul(a, pick(b, options["rhs_indices"]))
    if not widens(a):
        return mx.gather_mm(a, b, **options)
    return mx.gather_mm(a.astype(mx.float32), b.astype(mx.float32), **options).astype(a.dtype)


def pick(arrays: mx.array, index: mx.array) -> mx.array:
    """``arrays[index]`` for few ``arrays`` that are large, as a product with rows that hold a single one.

    On CUDA that copies twice as fast as MLX's gather, and its gradient is a product too (mlx 0.32.4).

    Args:
        arrays: (E, ...), finite: a number that is not makes NaN of all that are picked.
        index: Integers below E, any shape.

    Returns:
        (*index.shape, ...).
    """
    count, *shape = arrays.shape
    ones = (index[..., None] == mx.arange(count, dtype=index.dtype)).astype(arrays.dtype)
    return matmul(ones, arrays.reshape(count, -1)).reshape(*index.shape, *shape)


def in_rows(x: mx.array) -> mx.array:
    """``x`` (..., N) as a matrix; what is one already stays as it is, since MLX would make an operation of that."""
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def in_shape_of(x: mx.array, rows: mx.array) -> mx.array:
    """Rows of ``in_rows(x)``, or what was made of them, along the axes of ``x`` again."""
    return rows if x.ndim == 2 else rows.reshape(*x.shape[:-1], rows.shape[-1])


def widens(a: mx.array) -> bool:
    """Whether what is computed from ``a`` goes through fp32 here: half precision on the CPU backend."""
    return a.dtype in HALF and on_cpu()
