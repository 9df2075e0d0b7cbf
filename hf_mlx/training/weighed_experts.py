"""Experts' outputs that are weighed before the last product, so that what follows runs on tokens.

A block multiplies what each chosen expert gives by its weight and adds up. The last product of an expert is linear:
the weight may go before it, where an array is narrower, and a token's sum is taken at once. An adapter's B of the last
product then multiplies each token once, for all experts, in a plain product.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..adapters.low_rank import scaled
from ..adapters.parts import LoRASwitchLinear
from ..device import on_cuda
from ..models.products import addmm, gather_mm, matmul
from .take_rows import take_rows

#: Columns for each choice of a token, up to which all experts' A or B are one product.
TOKEN_COLUMNS = 512
# The only thing that mlx-lm's blocks do with what the experts give (mlx-lm 0.32, its models of mixtures).
_WEIGHED = re.compile(
    r"(\w+) = self\.switch_mlp\([^\n]*\)\n"
    r"\s+(?:\1 =|return) \(\1 \* \w+\[\.\.\., None\](?:\.astype\(mx\.float32\))?\)\.sum\(axis=-2\)"
    r"(?:\.astype\((?:\1|x)\.dtype\))?\n"
)


def weigh_first(blocks: Iterable[nn.Module]) -> None:
    """Let the experts of ``blocks`` know where all that is done with their outputs is to weigh and add them up.

    Args:
        blocks: With adapters attached.
    """
    for block in blocks:
        for module in block.modules():
            experts = getattr(module, "switch_mlp", None)
            if isinstance(experts, nn.Module) and _WEIGHED.search(_code(module)):
                experts.weighed = True


def _code(module: nn.Module) -> str:
    try:
        return inspect.getsource(type(module).__call__)
    except (OSError, TypeError):
        return ""


@dataclass(frozen=True)
class Outputs:
    """What the experts give, (..., choices, D): an array that is not there before it is weighed.

    Attributes:
        dtype: Of the experts' outputs.
        total: The weighed sum, from the weights (..., choices, 1).
    """

    dtype: mx.Dtype
    total: Callable[[mx.array], mx.array]

    def __mul__(self, weights: mx.array) -> Weighed:
        return Weighed(self, weights)


@dataclass(frozen=True)
class Weighed:
    """The outputs times their weights; there is no more to it than the sum over the choices."""

    outputs: Outputs
    weights: mx.array

    def sum(self, axis: int) -> mx.array:
        """(..., D), in the dtype that the product of both would have."""
        if axis != -2:
            raise ValueError(f"axis={axis}: what experts give is added up over the choices, axis=-2")
        dtype = mx.result_type(mx.zeros(0, self.outputs.dtype), self.weights)
        return self.outputs.total(self.weights).astype(dtype)


@dataclass(frozen=True)
class Sorted:
    """How the choices of tokens are sorted by expert.

    Attributes:
        order: Choice at each place.
        inverse: Place of each choice.
        chosen: Expert at each place.
        times: Choices of a token.
    """

    order: mx.array
    inverse: mx.array
    chosen: mx.array
    times: int

    @cached_property
    def token(self) -> mx.array:
        """Token at each place."""
        return self.order // self.times

    def weights(self, weights: mx.array) -> mx.array:
        """(..., choices, 1) at each place, (places, 1, 1)."""
        return weights.reshape(-1)[self.order][:, None, None]

    def add_up(self, y: mx.array) -> mx.array:
        """The sums of the rows of each token, (T, D) from (places, D)."""
        total: Any = mx.custom_function(lambda y: add_choices(take_rows(y, self.inverse), self.times))
        total.vjp(lambda _, by_out, __: take_rows(by_out, self.token))
        return total(y)

    def pick(self, every: mx.array, experts: int) -> mx.array:
        """Of (T · experts, r) the rows of the chosen experts, (places, r)."""
        pick: Any = mx.custom_function(lambda every: take_rows(every, self._picked(experts)))
        pick.vjp(lambda _, by_out, __: self._put(by_out, experts))
        return pick(every)

    def put(self, low: mx.array, experts: int) -> mx.array:
        """(places, r) as rows of (T · experts, r); zero where an expert was not chosen."""
        put: Any = mx.custom_function(lambda low: self._put(low, experts))
        put.vjp(lambda _, by_out, __: take_rows(by_out, self._picked(experts)))
        return put(low)

    def _picked(self, experts: int) -> mx.array:
        return self.token * experts + self.chosen

    def _put(self, low: mx.array, experts: int) -> mx.array:
        rows = mx.zeros((self.order.size // self.times * experts, low.shape[-1]), low.dtype)
        return rows.at[self._picked(experts)].add(low)


def add_choices(rows: mx.array, times: int) -> mx.array:
    """The sum of ``times`` rows after each other, (T, D) from (T · times, D)."""
    parts = rows.reshape(-1, times, rows.shape[-1])
    # Written out, the sum is one kernel with a float32 accumulator.
    return sum((parts[:, c].astype(mx.float32) for c in range(1, times)), parts[:, 0]).astype(rows.dtype)


def close(layer: Any, hidden: mx.array, places: Sorted) -> mx.array:
    """The sums over each token's choices of ``layer``, experts' last product, without a bias; (T, D).

    Args:
        layer: A stack of weights, or an adapter around it.
        hidden: Its input, weighed, (places, 1, in).
        places: How its rows are sorted.
    """
    if not isinstance(layer, LoRASwitchLinear) or not is_narrow(layer, places.times):
        return places.add_up(layer(hidden, places.chosen, sorted_indices=True).squeeze(-2))
    total = places.add_up(layer.base_layer(hidden, places.chosen, sorted_indices=True).squeeze(-2))
    dtype = layer.compute_dtype
    a, b = (factor.astype(dtype) for factor in layer.factors(layer.held))
    options: dict[str, Any] = {"rhs_indices": places.chosen, "sorted_indices": True}
    low = scaled(gather_mm(hidden.astype(dtype), a.swapaxes(-1, -2), **options), layer.scale).squeeze(-2)
    columns = layer.experts * layer.r
    by_token, by_expert = places.put(low, layer.experts).reshape(-1, columns), b.swapaxes(-1, -2).reshape(columns, -1)
    if total.dtype == dtype:
        return addmm(total, by_token, by_expert)
    return (total + matmul(by_token, by_expert)).astype(total.dtype)


def is_linear(layer: Any) -> bool:
    """Whether the weights of the choices may go before ``layer``: a stack without a bias, adapted or not."""
    return "bias" not in (layer.base_layer if isinstance(layer, LoRASwitchLinear) else layer)


def is_narrow(owner: LoRASwitchLinear, times: int) -> bool:
    """Whether a product of every token with all experts' A, or B, takes less than gathered ones of its ``times`` rows.

    CUDA's gathered products compute 128 columns, whatever the rank, at a third of the speed of a plain one.
    """
    return on_cuda() and owner.experts * owner.r <= TOKEN_COLUMNS * times
