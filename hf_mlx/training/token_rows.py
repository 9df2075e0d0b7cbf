"""Linear layers over rows of one token, as pairs that share a prompt go through a model: one product, not one a row.

MLX makes one product of ``x @ weight.T`` whatever rows there are, but of ``addmm``, which adds a bias or a low-rank
path, one for each row (mlx 0.32.4).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..adapters.layers import LoRALinear

_LINEAR = (nn.Linear, nn.QuantizedLinear, LoRALinear)


def multiply_together(model: nn.Module) -> None:
    """Make the linear layers of ``model`` take rows of one token, (N, 1, in), as one row of N; no number changes.

    The classes are left alone: the instances get a subclass.
    """
    for module in model.modules():
        if isinstance(module, _LINEAR) and not getattr(module, "together", False):
            module.__class__ = _together(type(module))


@cache
def _together(base: type[Any]) -> type[Any]:
    def call(self: Any, x: mx.array) -> mx.array:
        if x.ndim != 3 or x.shape[1] != 1:
            return base.__call__(self, x)
        return mx.expand_dims(base.__call__(self, x.squeeze(1)), 1)

    return type(f"Together{base.__name__}", (base,), {"__call__": call, "together": True})
