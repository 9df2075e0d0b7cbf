"""Products with frozen weights, which take fewer operations: what is fixed about a weight is done once, not each step.

A compiled step makes every operation anew each time it is called, on the host, those that only look at a weight from
another side included.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .precision import CastLinear
from .products import addmm, matmul
from .sums import sum_rows


def turn_frozen_weights(model: nn.Module) -> None:
    """Make the linear layers of ``model`` multiply with a view of their weight that is turned already.

    No number changes. The classes are left alone: the instances get a subclass. To be called where nothing is traced
    yet, and again once weights are others; a weight that was exchanged since is turned in the trace, as it always was.

    Args:
        model: With its trainable parameters chosen and its weights read.
    """
    for module in model.modules():
        if type(module) in (nn.Linear, CastLinear) and "weight" not in module.trainable_parameters():
            module.__class__ = _turned(type(module))
        if isinstance(module, FrozenLinear):
            module.turn()


class FrozenLinear(nn.Linear):
    """A Linear that knows its weight turned, and the derivative of its product."""

    def turn(self) -> None:
        """Look at the weight from the other side; it is not copied."""
        self._view = _View(self.weight)

    def multiply(self, x: mx.array) -> mx.array:
        """``x @ weight.T + bias``, for an ``x`` in the dtype of the weight."""
        turned = self._view.turned if self._view.weight is self.weight else self.weight.T
        if "bias" not in self:
            return matmul(x, turned)
        bias = self.bias.astype(x.dtype)
        if "bias" not in self.trainable_parameters():
            return addmm(bias, x, turned)
        product: Any = mx.custom_function(lambda x, bias: addmm(bias, x, turned))
        product.vjp(lambda _, by_out, __: (self.multiply_back(by_out), sum_rows(by_out)))
        return product(x, bias)

    def multiply_back(self, by_out: mx.array) -> mx.array:
        """The gradient of ``x``, for one of :meth:`multiply`'s result."""
        return matmul(by_out, self.weight)


class _View:
    """A weight and what it is turned; no array of a module's, so that nobody takes it for a parameter."""

    def __init__(self, weight: mx.array) -> None:
        self.weight, self.turned = weight, weight.T
        mx.eval(self.turned)


@cache
def _turned(base: type[Any]) -> type[Any]:
    def call(self: Any, x: mx.array) -> mx.array:
        casts = getattr(self, "compute_dtype", None)
        x = x.astype(casts or x.dtype)
        alike = [self.weight, *([self.bias] if "bias" in self and casts is None else [])]
        return self.multiply(x) if all(array.dtype == x.dtype for array in alike) else base.__call__(self, x)

    return type(f"Turned{base.__name__}", (FrozenLinear, base), {"__call__": call})
