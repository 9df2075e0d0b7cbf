"""Gradients of trained weights in the layout of the weights.

MLX's own backward pass of ``x @ weight.T`` makes the gradient of the transposed array and turns it, so every later
reader, the norm and the update, goes through memory across its rows. Here the product is the other way round.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..device import on_cpu
from ..models.precision import CastEmbedding, CastLinear
from ..models.products import addmm, in_rows, in_shape_of, matmul
from ..models.sums import sum_rows
from .take_rows import take_rows

_LINEAR = (nn.Linear, CastLinear)
_EMBEDDING = (nn.Embedding, CastEmbedding)


def lay_out_gradients(model: nn.Module) -> None:
    """Make the layers of ``model`` whose weight is trained give its gradient in row order; no number changes.

    Args:
        model: With its trainable parameters chosen. Linear layers, and embeddings that are the head too: the instances
            get a subclass, names and parameters stay.
    """
    for module in model.modules():
        if "weight" not in module.trainable_parameters():
            continue
        if type(module) in _LINEAR:
            module.__class__ = _linear(type(module))
        elif type(module) in _EMBEDDING:
            module.__class__ = _embedding(type(module))


def project(x: mx.array, weight: mx.array, bias: mx.array | None = None, *, ordered: bool = False) -> mx.array:
    """``x @ weight.T + bias``, whose gradient by ``weight`` is contiguous.

    Args:
        x: (..., in), in the dtype of the product.
        weight: (out, in). One in another dtype is cast for the product, and once more on the way back: kept in between,
            what autocast makes of all weights would be half as large again as they are.
        bias: (out,), in the dtype of ``x``.
        ordered: The gradient of ``x`` is begun after the others, see :mod:`~hf_mlx.training.backward_order`.

    Returns:
        (..., out), differentiable in all three.
    """

    def forward(x: mx.array, weight: mx.array, *bias: mx.array) -> mx.array:
        weight = weight.astype(x.dtype)
        return addmm(bias[0], x, weight.T) if bias else matmul(x, weight.T)

    def backward(primals: Any, by_out: mx.array, _: Any) -> tuple[mx.array, ...]:
        x, weight, *bias = primals
        by_params = [matmul(by_out.T, x).astype(weight.dtype), *(sum_rows(by_out) for _ in bias)]
        if ordered:
            # What is multiplied there is read no more, and its memory free, when the gradient of `x` comes.
            (by_out,) = mx.depends([by_out], by_params)
        if weight.dtype != x.dtype:
            # Not the cast of the forward pass, which the compiler would keep for both.
            (weight,) = mx.depends([weight], [by_out])
        return (matmul(by_out, weight.astype(x.dtype)), *by_params)

    product: Any = mx.custom_function(forward)
    product.vjp(backward)
    return in_shape_of(x, product(in_rows(x), weight, *([] if bias is None else [bias])))


def _linear(base: Any) -> Any:
    def call(self: Any, x: mx.array) -> mx.array:
        if not self.training:
            return base.__call__(self, x)
        x, *bias = _cast(self, x, *([self.bias] if "bias" in self else []))
        weight = self.weight if self.casts_again else self.weight.astype(x.dtype)
        return project(x, weight, *bias, ordered=self.orders_backward)

    return type(f"Laid{base.__name__}", (base,), {"__call__": call, "orders_backward": False, "casts_again": True})


def look_up(weight: mx.array, tokens: mx.array) -> mx.array:
    """``weight[tokens]`` of a table (rows, dim), tokens' or experts', whose gradient adds up what each row gets."""

    def backward(weight: mx.array, by_rows: mx.array, _: mx.array) -> mx.array:
        rows, at = by_rows.reshape(-1, by_rows.shape[-1]), tokens.reshape(-1)
        if weight.dtype != mx.float32 and not on_cpu():
            rows, at = _add_alike(rows, at)
        return mx.zeros_like(weight).at[at].add(rows)

    found: Any = mx.custom_function(lambda weight: take_rows(weight, tokens))
    found.vjp(backward)
    return found(weight)


def _add_alike(rows: mx.array, tokens: mx.array) -> tuple[mx.array, mx.array]:
    """Rows (N, dim) that belong to one token, added up in float32: as many rows, zeros in place of what was added.

    A token that comes often would stop to learn: in bfloat16 256 + 1 is 256. torch adds up in float32 on CUDA (torch
    2.13, aten/src/ATen/native/cuda/Embedding.cu), and in the dtype of the weight on the CPU, as MLX does.
    """
    order = mx.argsort(tokens)
    alike = tokens[order]
    begins = mx.concatenate([mx.array([True]), alike[1:] != alike[:-1]])
    slots = mx.cumsum(begins.astype(mx.int32)) - 1
    sums = mx.zeros(rows.shape, mx.float32).at[slots].add(take_rows(rows, order).astype(mx.float32))
    return sums.astype(rows.dtype), mx.zeros_like(alike).at[slots].add(mx.where(begins, alike, 0))


def _embedding(base: Any) -> Any:
    def call(self: Any, x: mx.array) -> mx.array:
        return look_up(self.weight, x) if self.training else base.__call__(self, x)

    def as_linear(self: Any, x: mx.array) -> mx.array:
        return project(_cast(self, x)[0], self.weight) if self.training else base.as_linear(self, x)

    return type(f"Laid{base.__name__}", (base,), {"__call__": call, "as_linear": as_linear})


def _cast(layer: Any, *arrays: mx.array) -> list[mx.array]:
    """``arrays`` in the dtype that ``layer`` multiplies in."""
    dtype = getattr(layer, "compute_dtype", None) or mx.result_type(*arrays, layer.weight)
    return [array.astype(dtype) for array in arrays]
