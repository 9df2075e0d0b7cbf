"""Autocast: Linear layers compute in a lower precision while the residual stream stays as it is.

torch's autocast (torch 2.13, ``torch.amp.autocast_mode``) casts the inputs and the weight of every matmul
and leaves everything else alone, so an fp32 model under bf16 autocast keeps its residual, norms and
embedding in fp32. Here the same layers are replaced by subclasses that do the casts; parameter names stay.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path
from mlx_lm.models import rope_utils
from mlx_lm.models.switch_layers import SwitchLinear

from .blockwise import BlockLinear
from .overrides.rope import LongRope
from .products import addmm, gather_mm, matmul, widens


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
            return addmm(self.bias.astype(dtype), x, weight.T)
        return matmul(x, weight.T)


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
        return matmul(x.astype(self.compute_dtype), self.weight.astype(self.compute_dtype).T)


class CastSwitchLinear(SwitchLinear):
    """Stacked experts, computed in the dtype of their weights.

    torch's autocast does not reach them: transformers 5.23 ``integrations.moe.grouped_mm_experts_forward``, its
    default, casts the input to the weights' dtype and multiplies there.
    """

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        weight = self.weight
        x = gather_mm(
            x.astype(weight.dtype), weight.swapaxes(-1, -2), rhs_indices=indices, sorted_indices=sorted_indices
        )
        return x + self.bias[indices][..., None, :] if "bias" in self else x


def cast_for_experts(model: nn.Module) -> None:
    """Make the experts of ``model`` multiply in the dtype of their weights, in place: :class:`CastSwitchLinear`.

    MLX's own know float32 alone on the CPU (mlx 0.32.4, ``GatherMM::eval_cpu``).
    """
    for module in model.modules():
        if type(module) is SwitchLinear:
            module.__class__ = CastSwitchLinear


def _recast(base: BlockLinear, compute_dtype: mx.Dtype) -> BlockLinear:
    base.compute_dtype = compute_dtype
    return base


_CAST = {
    BlockLinear: _recast,
    nn.Linear: CastLinear,
    nn.QuantizedLinear: CastQuantizedLinear,
    nn.Embedding: CastEmbedding,
}


_ROTARY = (
    nn.RoPE,
    rope_utils.Llama3RoPE,
    rope_utils.ProportionalRoPE,
    rope_utils.SuScaledRoPE,
    rope_utils.YarnRoPE,
    LongRope,
)


@cache
def _widened(rotary: type[Any]) -> type[Any]:
    """Rotates in fp32 and rounds once, as MLX's GPU kernels and torch's autocast do.

    MLX's CPU backend rounds the sines, each product and the sum to bf16 instead, half as far again from the exact
    values.
    """

    class Widened(rotary):
        def __call__(self, x: mx.array, *args: Any, **options: Any) -> mx.array:
            if not widens(x):
                return super().__call__(x, *args, **options)
            return super().__call__(x.astype(mx.float32), *args, **options).astype(x.dtype)

    Widened.__name__ = f"Widened{rotary.__name__}"
    return Widened


def apply_autocast(model: nn.Module, compute_dtype: mx.Dtype) -> None:
    """Replace the Linear, Embedding, expert and rotary layers of ``model`` by their casting subclasses, in place.

    Args:
        model: An mlx-lm model; its parameter names do not change.
        compute_dtype: What products run in, e.g. ``mx.bfloat16``.
    """

    def cast(_: str, module: nn.Module) -> nn.Module:
        replacement = _CAST.get(type(module))
        return module if replacement is None else replacement(module, compute_dtype)

    cast_for_experts(model)
    model.update_modules(tree_map_with_path(cast, model.leaf_modules(), is_leaf=nn.Module.is_module))
    for module in model.modules():
        if isinstance(module, _ROTARY):
            module.__class__ = _widened(type(module))


def store_frozen_weights(model: nn.Module, compute_dtype: mx.Dtype) -> None:
    """Keep frozen Linear weights in the dtype they are multiplied in.

    Autocast rounds them at every product anyway, so no number changes and half of the memory goes.
    """
    for module in model.modules():
        if isinstance(module, CastLinear) and not module.trainable_parameters():
            module.weight = module.weight.astype(compute_dtype)
            if "bias" in module:
                module.bias = module.bias.astype(compute_dtype)
