"""Attention whose training step never holds a matrix of length x length: a block of queries at a time.

MLX has a fused backward pass of attention on CUDA alone, in half precision and for heads of up to 128 numbers.
Elsewhere it keeps the probabilities of every layer, which grow with the square of the length. Here each block of
queries attends to the keys up to its end; the backward pass computes its scores once more. A causal mask leaves about
half of the scores uncomputed, which pays for that.

Source: Rabe, Staats, "Self-attention Does Not Need O(n²) Memory" (2021); Dao et al., "FlashAttention" (2022).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import scaled_dot_product_attention

from ..device import on_cpu, on_cuda
from ..models.load import LoadedModel
from ..models.masks import Causal, RowCache
from ..models.rebinding import calls, methods, rebound
from .cpu_attention import attention
from .shared_rows import PromptCache
from .windows import Part, attend_in_windows, divide_window, is_reached

# Queries of a block. More on CUDA, where starting the kernels of small ones would take longer than they do: as many as
# have no more scores than that, and those of a window at least.
BLOCK, CUDA_BLOCK, CUDA_WINDOW_BLOCK = 128, 1024, 512
CUDA_SCORES = 2**27
# What cuDNN's attention takes (mlx 0.32.4, backend/cuda/scaled_dot_product_attention.cpp).
FUSED_WIDTH, FUSED_STEP = 128, 8
# Shorter rows are computed at once: what a block costs beside its products would not be won back.
# On the CPU what blocks leave uncomputed is worth more.
LEAST, CPU_LEAST = 1024, 512

_CALLED = scaled_dot_product_attention.__name__
# What stands in for attention at the moment, the last one first.
_STAND_INS: list[Callable[..., mx.array]] = []


def attend_in_blocks(blocks: Iterable[nn.Module]) -> None:
    """Make the attention of ``blocks`` train a block of queries at a time; equal up to the order of sums.

    An attention layer is recognised by its code, which calls mlx-lm's ``scaled_dot_product_attention``. The class is
    left alone: the instances get a subclass, whose methods call :func:`blocked_attention` instead. Latent attention
    (MLA) adds scores of its own in a matrix of length x length and stays as it is.

    Args:
        blocks: The model's layers.
    """
    for block in blocks:
        for module in block.modules():
            calls = {} if hasattr(module, "kv_lora_rank") else _calling(type(module))
            if calls:
                module.__class__ = _blocked(type(module), calls)


def attends_in_blocks(block: nn.Module, length: int) -> bool:
    """Whether :func:`attend_in_blocks` keeps ``block`` from holding the scores of ``length`` x ``length`` pairs."""
    return length >= least_tokens() and any(getattr(module, "in_blocks", False) for module in block.modules())


def blocked_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None = None,
) -> mx.array:
    """mlx-lm's ``scaled_dot_product_attention``, with its arguments, in blocks where that is known to be the same.

    Args:
        queries: (B, heads, T, D).
        keys: (B, key heads, S, D).
        values: (B, key heads, S, Dv).
        cache: None, or what masks packed and padded rows.
        scale: Of the scores.
        mask: ``"causal"``, with a window or not, None, or (…, T, S) bool. One that is added to the scores may have a
            gradient of its own, so attention is computed at once then.
        sinks: (heads,) logits of a key without a value.

    Returns:
        (B, heads, T, Dv).
    """
    if _STAND_INS:
        return _STAND_INS[-1](queries, keys, values, cache, scale, mask, sinks)
    if isinstance(cache, PromptCache):
        return cache.attend(
            queries, keys, values, mask, lambda q, k, v, seen: blocked_attention(q, k, v, None, scale, seen, sinks)
        )
    length, known = queries.shape[-2], cache is None or isinstance(cache, RowCache)
    array = mask if isinstance(mask, mx.array) else None
    added = array is not None and array.dtype != mx.bool_
    if length < least_tokens() or not known or added or is_fused(queries.dtype, queries.shape[-1], values.shape[-1]):
        if isinstance(mask, Causal):
            mask = mask.between(range(length), range(length))
        if known and not added and sinks is None:
            return attention(queries, keys, values, scale, mask)
        at_once: Any = scaled_dot_product_attention
        return at_once(queries, keys, values, cache, scale=scale, mask=mask, sinks=sinks)
    # mlx-lm's own masks of two axes are causal, with a window or a chunk; so are those of our caches.
    causal = cache is not None or (mask is not None and (array is None or array.ndim == 2))
    in_blocks = _Attention(scale, mask, causal, keys.shape[-2] - length)
    return in_blocks(queries, keys, values, *([] if sinks is None else [sinks]))


@contextmanager
def attending(stand_in: Callable[..., mx.array]) -> Iterator[None]:
    """A block in which :func:`blocked_attention` is ``stand_in``, called with all its arguments in their order."""
    _STAND_INS.append(stand_in)
    try:
        yield
    finally:
        _STAND_INS.pop()


def written_windows(loaded: LoadedModel) -> float:
    """Tokens of the longest row whose windows are written out in a mask, see :class:`~hf_mlx.models.masks.RowCache`.

    Asked once :func:`attend_in_blocks` was called.
    """
    return least_tokens() - 1 if is_reached(loaded) else math.inf


def is_fused(dtype: mx.Dtype, *widths: int) -> bool:
    """Whether MLX has a kernel for the backward pass of attention.

    Args:
        dtype: Of the queries.
        widths: Numbers of a head's query, and of a value.
    """
    fitting = all(width <= FUSED_WIDTH and width % FUSED_STEP == 0 for width in widths)
    return on_cuda() and dtype != mx.float32 and fitting


def least_tokens() -> int:
    """Tokens of the shortest row that is attended in blocks on the device that MLX uses."""
    return CPU_LEAST if on_cpu() else LEAST


def block_queries(scores: int) -> int:
    """Queries of a block on the device that MLX uses.

    Args:
        scores: Of one query in each row: keys and heads of all rows.
    """
    if not on_cuda():
        return BLOCK
    return CUDA_BLOCK if CUDA_BLOCK * scores <= CUDA_SCORES else CUDA_WINDOW_BLOCK


class _Attention:
    """Attention of all blocks of queries, forwards and backwards.

    Attributes:
        causal: Query i sees none of the keys after ``i + offset``.
    """

    def __init__(self, scale: float, mask: mx.array | str | None, causal: bool, offset: int) -> None:
        self.scale, self.mask, self.causal, self.offset = scale, mask, causal, offset

    def __call__(self, *primals: mx.array) -> mx.array:
        attend: Any = mx.custom_function(self._forward)
        attend.vjp(self._backward)
        return attend(*primals)

    def _forward(self, *primals: mx.array) -> mx.array:
        outputs: list[mx.array] = []
        for part in self._parts(primals):
            # One after the other, or the scores of all would be alive together.
            inputs = part.take(mx.depends(list(primals), outputs[-1:]) if outputs else list(primals))
            outputs.append(self._attend(part)(*inputs))
        return mx.concatenate(outputs, axis=-2)

    def _backward(self, primals: Any, cotangent: mx.array, _: Any) -> tuple[mx.array, ...]:
        by_queries: list[mx.array] = []
        rest: list[mx.array] = []
        before, begin = [cotangent], 0
        for part in reversed(self._parts(primals)):
            inputs = part.take(mx.depends(list(primals), before))
            _, (by_query, *by_rest) = mx.vjp(self._attend(part), inputs, [part.of_queries(cotangent)])
            by_queries.append(by_query)
            by_rest = [x.astype(mx.float32) for x in by_rest]
            rest = [_add(x, begin - part.begin, y) for x, y in zip(rest, by_rest, strict=True)] if rest else by_rest
            before, begin = [by_query, *rest], part.begin
        gradients = [mx.concatenate(by_queries[::-1], axis=-2), *rest]
        return tuple(x.astype(primal.dtype) for x, primal in zip(gradients, primals, strict=True))

    def _parts(self, primals: Sequence[mx.array]) -> list[Part]:
        """What is computed together, from the first query to the last; each sees no key before those of the next."""
        rows, heads, length, _ = primals[0].shape
        keys = primals[1].shape[-2]
        block = block_queries(rows * heads * keys)
        if isinstance(self.mask, Causal) and self.mask.window is not None:
            return divide_window(length, self.mask.window, min(block, CUDA_WINDOW_BLOCK), block)
        starts = range(0, length, block)
        ends = [min(start + block + self.offset, keys) if self.causal else keys for start in starts]
        return [Part(start, min(start + block, length), 0, end) for start, end in zip(starts, ends, strict=True)]

    def _attend(self, part: Part) -> Callable[..., mx.array]:
        def attend(queries: mx.array, keys: mx.array, values: mx.array, *sinks: mx.array) -> mx.array:
            if isinstance(self.mask, Causal) and part.width:
                return attend_in_windows(self._at_once, part, self.mask, queries, keys, values, *sinks)
            mask = self.mask
            if type(mask) is str and on_cuda():
                # One array for all layers, where MLX would write it out for each.
                mask = Causal(None)
            if isinstance(mask, Causal):
                mask = mask.between(range(part.start, part.stop), range(part.begin, part.end))
            elif isinstance(mask, mx.array):
                rows = slice(part.start, part.stop) if mask.shape[-2] > 1 else slice(None)
                mask = mask[..., rows, part.begin : part.end]
            return self._at_once(queries, keys, values, mask, *sinks)

        return attend

    def _at_once(self, queries: mx.array, keys: mx.array, values: mx.array, mask: Any, *sinks: mx.array) -> mx.array:
        if not sinks:
            return attention(queries, keys, values, self.scale, mask)
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=self.scale, mask=mask, sinks=sinks[0])


def _add(total: mx.array, ahead: int, part: mx.array) -> mx.array:
    """The sum over keys (…, K, D) and over those that begin ``ahead`` of them; over arrays without keys as they are."""
    if total.ndim == 1 or (total.shape == part.shape and not ahead):
        return total + part
    shared = part.shape[-2] - ahead
    pieces = [part[..., :ahead, :], total[..., :shared, :] + part[..., ahead:, :], total[..., shared:, :]]
    return mx.concatenate([piece for piece in pieces if piece.size], axis=-2)


def _calling(kind: type[nn.Module]) -> dict[str, FunctionType]:
    """The methods of a class that call mlx-lm's attention."""
    found = methods(kind).items()
    return {name: method for name, method in found if calls(method, _CALLED, scaled_dot_product_attention)}


def _blocked(kind: type[nn.Module], calling: dict[str, FunctionType]) -> type[nn.Module]:
    def replaced(method: FunctionType) -> Any:
        inner = rebound(method, _CALLED, blocked_attention)

        def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            said = any(isinstance(arg, (Causal, PromptCache)) for arg in (*args, *kwargs.values()))
            return (inner if self.training or said else method)(self, *args, **kwargs)

        return call

    replacing = {name: replaced(method) for name, method in calling.items()}
    return type(f"Blocked{kind.__name__}", (kind,), {**replacing, "in_blocks": True})
