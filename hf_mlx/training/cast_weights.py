"""A model in another dtype for a while: evaluation in bfloat16 beside training in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map


@contextmanager
def cast_weights(model: nn.Module, dtype: mx.Dtype) -> Iterator[None]:
    """Every floating weight of ``model`` in ``dtype`` inside the block; afterwards the very arrays from before.

    What was compiled before holds the old frozen weights as constants, so trace anew inside the block.

    Args:
        model: Adapters included; their products run in ``dtype`` too, as PEFT's do in the dtype of their weights.
        dtype: E.g. ``mx.bfloat16``.
    """
    held: Any = model.parameters()
    products = [(module, module.compute_dtype) for module in model.modules() if hasattr(module, "compute_dtype")]
    model.update(tree_map(lambda x: x.astype(dtype) if mx.issubdtype(x.dtype, mx.floating) else x, held))
    for module, _ in products:
        module.compute_dtype = dtype
    try:
        yield
    finally:
        model.update(held)
        for module, compute_dtype in products:
            module.compute_dtype = compute_dtype
