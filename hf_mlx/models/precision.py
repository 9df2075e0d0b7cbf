"""Autocast: Linear layers compute in a lower precision while the residual stream stays as it is.

torch's autocast (torch 2.13, ``torch.amp.autocast_mode``) casts the inputs and the weight of every matmul
and leaves everything else alone, so an fp32 model under bf16 autocast keeps its residual, norms and
embedding in fp32. Here the same layers are replaced by subclasses that do the casts; parameter names stay.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path


class CastLinear(nn.Linear):
    """A Linear whose product runs in ``compute_dtype``, whatever dtype its input and weight have."""

    def __init__(self, base: nn.Linear, compute_dtype: mx.Dtype) -> None:
        nn.Module.__init__(self)
        self.weight = base.weight
        if "bias" in base:
            self.bias = base.bias
        self.compute_dtype = compute_dtype

    def __call__(self, x: mx.array) -> mx.array:
        dtype = self.compute_dtype
        x, weight = x.astype(dtype), self.weight.astype(dtype)
        if "bias" in self:
            return mx.addmm(self.bias.astype(dtype), x, weight.T)
        return x @ weight.T


class CastQuantizedLinear(nn.QuantizedLinear):
    """A quantised Linear whose input is cast to ``compute_dtype`` first."""

    def __init__(self, base: nn.QuantizedLinear, compute_dtype: mx.Dtype) -> None:
        nn.Module.__init__(self)
        for name, value in base.items():
            self[name] = value
        self.group_size, self.bits, self.mode = base.group_size, base.bits, base.mode
        self.compute_dtype = compute_dtype

    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(x.astype(self.compute_dtype)).astype(self.compute_dtype)


class CastEmbedding(nn.Embedding):
    """An Embedding that looks up in its own dtype and, used as a tied head, projects in ``compute_dtype``."""

    def __init__(self, base: nn.Embedding, compute_dtype: mx.Dtype) -> None:
        nn.Module.__init__(self)
        self.weight = base.weight
        self.compute_dtype = compute_dtype

    def as_linear(self, x: mx.array) -> mx.array:
        return x.astype(self.compute_dtype) @ self.weight.astype(self.compute_dtype).T


_CAST = {nn.Linear: CastLinear, nn.QuantizedLinear: CastQuantizedLinear, nn.Embedding: CastEmbedding}


def apply_autocast(model: nn.Module, compute_dtype: mx.Dtype) -> None:
    """Replace every Linear and Embedding of ``model`` by its casting subclass, in place.

    Args:
        model: An mlx-lm model; its parameter names do not change.
        compute_dtype: What products run in, e.g. ``mx.bfloat16``.
    """

    def cast(_: str, module: nn.Module) -> nn.Module:
        replacement = _CAST.get(type(module))
        return module if replacement is None else replacement(module, compute_dtype)

    model.update_modules(tree_map_with_path(cast, model.leaf_modules(), is_leaf=nn.Module.is_module))


def store_frozen_weights(model: nn.Module, compute_dtype: mx.Dtype) -> None:
    """Keep frozen Linear weights in the dtype they are multiplied in.

    Autocast rounds them at every product anyway, so no number changes and half of the memory goes.
    """
    for module in model.modules():
        if isinstance(module, CastLinear) and not module.trainable_parameters():
            module.weight = module.weight.astype(compute_dtype)
            if "bias" in module:
                module.bias = module.bias.astype(compute_dtype)
