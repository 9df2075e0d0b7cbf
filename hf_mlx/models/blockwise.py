"""Linear layers over the 4-bit codes of bitsandbytes (NF4, FP4), in public MLX operations.

A weight is a code of four bits, looked up in a table of 16 numbers, times the scale of its block, rounded to the
dtype that the checkpoint names. Source: bitsandbytes 0.50 ``functional.dequantize_4bit`` and
``backends.default.ops._dequantize_4bit_compute``; the tables are those of ``functional.get_4bit_type``.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .products import matmul

_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
TABLES = {"nf4": _NF4, "fp4": tuple(sign * value / 12.0 for sign in (1, -1) for value in _FP4)}


def dequantize(codes: mx.array, scales: mx.array, kind: str, block: int, dtype: mx.Dtype) -> mx.array:
    """Numbers of flat codes.

    Args:
        codes: (bytes,) uint8, the first of two numbers in the upper half of a byte.
        scales: (blocks,) fp32.
        kind: ``"nf4"`` or ``"fp4"``.
        block: Numbers to a scale.
        dtype: What they are rounded to.

    Returns:
        (2 · bytes,); the last block may be short.
    """
    values = _pairs(kind)[codes].reshape(-1)
    short = -values.size % block
    if short:
        values = mx.pad(values, (0, short))
    values = (values.reshape(-1, block) * scales[:, None]).reshape(-1)
    return (values[:-short] if short else values).astype(dtype)


def quantize(weight: mx.array, kind: str, block: int) -> tuple[mx.array, mx.array]:
    """Codes and scales of a matrix whose rows are whole blocks: the nearest number of the table to each.

    Args:
        weight: (out, in).
        kind: ``"nf4"`` or ``"fp4"``.
        block: Numbers to a scale; divides ``in``.

    Returns:
        (out, in / 8) uint32 and (out, in / block) fp32.
    """
    rows, columns = weight.shape
    blocks = weight.astype(mx.float32).reshape(rows, -1, block)
    scales = mx.abs(blocks).max(axis=-1)
    parts = blocks / mx.where(scales == 0, 1.0, scales)[..., None]
    order = sorted(range(16), key=lambda code: TABLES[kind][code])
    ranked = [TABLES[kind][code] for code in order]
    rank = mx.zeros(parts.shape, mx.uint8)
    for low, high in pairwise(ranked):
        rank = rank + (parts > (low + high) / 2).astype(mx.uint8)
    codes = mx.array(order, mx.uint8)[rank].reshape(rows, columns // 2, 2)
    return ((codes[..., 0] << 4) | codes[..., 1]).view(mx.uint32), scales


class BlockLinear(nn.QuantizedLinear):
    """A frozen Linear that holds 4-bit codes and computes its weight where a product needs it.

    Nothing of the dense weight is kept between forward and backward, which computes it again. As in bitsandbytes'
    ``Linear4bit`` the product runs in ``compute_dtype`` and the result has the dtype of the input.

    Args:
        codes: (out · in / 2,) uint8.
        scales: (out · in / block,) fp32.
        shape: (out, in); ``in`` is a multiple of the block.
        kind: ``"nf4"`` or ``"fp4"``.
        dtype: What the checkpoint says that the weights are rounded to.
        compute_dtype: What products run in.
        bias: (out,), or None.
    """

    def __init__(
        self,
        codes: mx.array,
        scales: mx.array,
        shape: tuple[int, ...],
        kind: str,
        dtype: mx.Dtype,
        compute_dtype: mx.Dtype,
        bias: mx.array | None = None,
    ) -> None:
        nn.Module.__init__(self)
        # Whole words, so that what counts parameters of MLX's own packing counts these, too.
        self.weight = codes.reshape(shape[0], -1).view(mx.uint32)
        self.scales = scales.reshape(shape[0], -1)
        if bias is not None:
            self.bias = bias
        self.group_size, self.bits, self.mode = shape[1] // self.scales.shape[1], 4, kind
        self.dtype, self.compute_dtype = dtype, compute_dtype
        self.freeze()

    def dense_weight(self) -> mx.array:
        """The weight, (out, in), in the dtype that the checkpoint rounds it to."""
        codes, scales = self.weight.view(mx.uint8).reshape(-1), self.scales.reshape(-1)
        dense = dequantize(codes, scales, self.mode, self.group_size, self.dtype)
        return dense.reshape(self.weight.shape[0], -1)

    def __call__(self, x: mx.array) -> mx.array:
        out = self._multiply(x.astype(self.compute_dtype))
        if "bias" in self:
            out = out + self.bias.astype(out.dtype)
        return out.astype(x.dtype)

    def _multiply(self, x: mx.array) -> mx.array:
        def forward(x: mx.array) -> mx.array:
            return matmul(x, self.dense_weight().astype(x.dtype).T)

        def backward(_, by_out: mx.array, __) -> mx.array:
            return matmul(by_out, self.dense_weight().astype(by_out.dtype))

        product: Any = mx.custom_function(forward)
        product.vjp(backward)
        return product(x)


@cache
def _pairs(kind: str) -> mx.array:
    """The two numbers of each byte, (256, 2) fp32."""
    table = TABLES[kind]
    pairs = mx.array([[table[byte >> 4], table[byte & 15]] for byte in range(256)])
    # Made once, outside of any trace.
    mx.eval(pairs)
    return pairs
