"""LoRA on torch layers that MLX holds in several: one A, and of B each part takes the rows that are its own.

The pair belongs to the layer around the first part, in PEFT's shapes; the other parts compute with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import itemgetter
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear

from ..models.products import gather_mm, matmul
from .layers import LoRALinear, dense_weight, layer_dims
from .low_rank import add_low_rank, scaled


@dataclass(frozen=True)
class Rows:
    """The rows of a torch layer that one MLX layer holds.

    Attributes:
        take: Cuts them from an array whose first axis is the torch layer's rows.
        turned: The MLX layer holds them the other way round.
    """

    take: Callable[[mx.array], mx.array] = lambda whole: whole
    turned: bool = False

    def __call__(self, whole: mx.array) -> mx.array:
        return self.take(whole)


class LoRAPart(nn.Module):
    """A further part of an adapted layer.

    Args:
        base_layer: What MLX holds of the torch layer here.
        owner: The layer around the first part, which has the pair.
        rows: Of B, what belongs to this part.
    """

    def __init__(self, base_layer: Any, owner: Any, rows: Rows) -> None:
        super().__init__()
        self.base_layer = base_layer
        # Wrapped, so that the pair is no parameter of this module too.
        self._pair = SimpleNamespace(owner=owner)
        self._rows = rows

    @property
    def owner(self) -> Any:
        """The layer that has the pair."""
        return self._pair.owner

    def hold(self, rows: Rows) -> None:
        """Take these rows of B from here on."""
        self._rows = rows

    def __call__(self, x: mx.array, *args: Any, **options: Any) -> mx.array:
        return self._pair.owner.adapted(self.base_layer, self._rows, x, *args, **options)

    def merged_weight(self) -> mx.array:
        """Base weight with the adapter folded in, in the base's shape and dtype."""
        return self._pair.owner.merged(self.base_layer, self._rows)


class SplitLoRALinear(LoRALinear):
    """A Linear whose rows MLX keeps in several Linears (``input_linear`` as gate and up projection).

    Args:
        base_layer: The first of them.
        rows: Of B, what belongs to it.
        options: As for :class:`LoRALinear`; ``dims`` are those of the whole.
    """

    def __init__(self, base_layer: Any, *args: Any, rows: Rows, **options: Any) -> None:
        super().__init__(base_layer, *args, **options)
        self._rows = rows

    def __call__(self, x: mx.array, **options: Any) -> mx.array:
        return self.adapted(self.base_layer, self._rows, x, **options)

    def adapted(self, base_layer: Any, rows: Rows, x: mx.array) -> mx.array:
        """``base_layer(x)`` plus the rows' share of the low-rank product."""
        dtype = self.compute_dtype
        a, b = self.lora_A.astype(dtype), rows(self.lora_B.astype(dtype))
        if self._fuses():
            return add_low_rank(base_layer, x.astype(dtype), a, b, self.scale)
        base = base_layer(x)
        low = matmul(matmul(self._dropped(x).astype(dtype), a.T), b.T)
        return (base + scaled(low, self.scale)).astype(base.dtype)

    def merged_weight(self) -> mx.array:
        return self.merged(self.base_layer, self._rows)

    def merged(self, base_layer: Any, rows: Rows) -> mx.array:
        """The weight of one part with the adapter folded in, in its dtype."""
        weight = dense_weight(base_layer)
        return (weight + rows(self.lora_B) @ self.lora_A * self.scale).astype(weight.dtype)


class LoRALatent(SplitLoRALinear):
    """``kv_b_proj`` of latent attention, which mlx-lm keeps by head: ``embed_q`` (heads, rank, nope), the keys' part
    turned round, and ``unembed_out`` (heads, v, rank).

    Both map the latent to keys or values; one token at a time, ``embed_q`` maps queries to the latent instead.
    """

    @property
    def orders_backward(self) -> bool:
        """False: its gradients come in MLX's order."""
        return False

    def adapted(self, base_layer: Any, rows: Rows, x: mx.array, transpose: bool = True) -> mx.array:
        dtype = self.compute_dtype
        base = base_layer(x, transpose=transpose)
        a, b = self.lora_A.astype(dtype), rows(self.lora_B.astype(dtype))
        if transpose == rows.turned:
            low = matmul(matmul(x.astype(dtype), b), a)
        else:
            low = matmul(matmul(self._dropped(x).astype(dtype), a.T), b.swapaxes(-1, -2))
        return (base + scaled(low, self.scale)).astype(base.dtype)

    def merged(self, base_layer: Any, rows: Rows) -> mx.array:
        weight = dense_weight(base_layer)
        delta = rows(self.lora_B) @ self.lora_A * self.scale
        return (weight + (delta.swapaxes(-1, -2) if rows.turned else delta)).astype(weight.dtype)


class LoRASwitchLinear(nn.Module):
    """One low-rank product for each expert of a stack, as ``peft.tuners.lora.layer.ParamWrapper`` (0.21) holds them.

    PEFT adds the product to the stacked weight on every forward; here it is computed beside it, which needs no second
    stack and gives the same sums. It takes no dropout.

    Args:
        base_layer: mlx-lm's stack, or its first part.
        r: Rank of each expert.
        scale: Factor of the product.
        experts: How many experts the torch parameter stacks.
        dims: (in, out) of an expert's whole matrix.
        rows: Of an expert's B, what belongs to ``base_layer``.
        compute_dtype: Dtype of the two products.

    Attributes:
        lora_A: (experts · r, in), expert by expert, fp32.
        lora_B: (out, r · experts), rank by rank, fp32.
    """

    def __init__(
        self,
        base_layer: Any,
        r: int,
        scale: float,
        *,
        experts: int,
        dims: tuple[int, int],
        rows: Rows,
        compute_dtype: mx.Dtype = mx.float32,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.r, self.scale, self.experts = r, scale, experts
        self.compute_dtype = compute_dtype
        self.lora_A = mx.zeros((experts * r, dims[0]))
        self.lora_B = mx.zeros((dims[1], r * experts))
        self._rows = rows

    def hold(self, rows: Rows) -> None:
        """Take these rows of B for the first part from here on."""
        self._rows = rows

    @property
    def owner(self) -> Any:
        """The layer that has the pair: itself."""
        return self

    def factors(self, rows: Rows) -> tuple[mx.array, mx.array]:
        """A and the rows of B by expert: (experts, r, in) and (experts, rows, r)."""
        b = rows(self.lora_B)
        a = self.lora_A.reshape(self.experts, self.r, -1)
        return a, b.reshape(b.shape[0], self.r, self.experts).transpose(2, 0, 1)

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False, **options: Any) -> mx.array:
        return self.adapted(self.base_layer, self._rows, x, indices, sorted_indices, **options)

    def adapted(
        self,
        base_layer: Any,
        rows: Rows,
        x: mx.array,
        indices: mx.array,
        sorted_indices: bool = False,
        low: mx.array | None = None,
    ) -> mx.array:
        """What one part of the stack gives, plus its share of the low-rank products.

        Args:
            base_layer: The part.
            rows: Of B, what belongs to it.
            x: (..., 1, in).
            indices: Expert of each, (...).
            sorted_indices: They ascend.
            low: What A makes of ``x``, (..., 1, r), where the caller has it.
        """
        base = base_layer(x, indices, sorted_indices=sorted_indices)
        a, b = (factor.astype(self.compute_dtype).swapaxes(-1, -2) for factor in self.factors(rows))
        options: dict[str, Any] = {"rhs_indices": indices, "sorted_indices": sorted_indices}
        if low is None:
            low = gather_mm(x.astype(self.compute_dtype), a, **options)
        if self.compute_dtype == mx.float32:
            return (base + scaled(gather_mm(low, b, **options), self.scale)).astype(base.dtype)
        # As in :mod:`~hf_mlx.adapters.low_rank`, the scale goes where the array is small.
        return (base + gather_mm(scaled(low, self.scale), b, **options)).astype(base.dtype)

    def merged_weight(self) -> mx.array:
        """Stacked weight with the products folded in, (experts, out, in), in the base's dtype."""
        return self.merged(self.base_layer, self._rows)

    def merged(self, base_layer: Any, rows: Rows) -> mx.array:
        """:meth:`merged_weight` of one part."""
        weight = dense_weight(base_layer)
        a, b = (factor[: weight.shape[0]] for factor in self.factors(rows))
        return (weight + (b @ a) * self.scale).astype(weight.dtype)


class LoRARouter(nn.Module):
    """A router of a class of its own, whose weight is read with ``scale · B A`` added to it.

    Attributes:
        lora_A: (r, in), fp32.
        lora_B: (experts, r), fp32.
    """

    def __init__(self, base_layer: Any, r: int, scale: float, compute_dtype: mx.Dtype = mx.float32) -> None:
        super().__init__()
        outputs, inputs = base_layer.weight.shape
        self.base_layer = base_layer
        self.r, self.scale = r, scale
        self.compute_dtype = compute_dtype
        self.lora_A = mx.zeros((r, inputs))
        self.lora_B = mx.zeros((outputs, r))

    def __call__(self, x: mx.array) -> Any:
        base = self.base_layer
        kept = base.weight
        base.weight = self.merged_weight()
        try:
            return base(x)
        finally:
            base.weight = kept

    def merged_weight(self) -> mx.array:
        """Base weight with the adapter folded in, (experts, in), in the base's dtype."""
        weight = self.base_layer.weight
        return (weight + (self.lora_B @ self.lora_A) * self.scale).astype(weight.dtype)


def part_dims(modules: Sequence[Any]) -> tuple[int, int]:
    """(input, output features) of the torch layer that these MLX layers are the parts of; of one expert in a stack."""
    if isinstance(modules[0], _BY_HEAD):
        keys, values = (_head_shape(module) for module in modules)
        return keys[1], keys[0] * (keys[2] + values[1])
    dims = [layer_dims(module) for module in modules]
    return dims[0][0], sum(outputs for _, outputs in dims)


def split_rows(modules: Sequence[Any], *, strided: bool = False) -> list[Rows]:
    """Which of the torch layer's rows each of its parts holds; ``strided`` ones take turns."""
    if isinstance(modules[0], _BY_HEAD):
        (heads, _, nope), (_, value, _) = (_head_shape(module) for module in modules)

        def by_head(whole: mx.array) -> mx.array:
            return whole.reshape(heads, nope + value, -1)

        return [Rows(lambda b: by_head(b)[:, :nope], turned=True), Rows(lambda b: by_head(b)[:, nope:])]
    if len(modules) == 1:
        return [Rows()]
    if strided:
        cuts = [slice(start, None, len(modules)) for start in range(len(modules))]
        return [Rows(itemgetter(cut)) for cut in cuts]
    ends = list(accumulate(layer_dims(module)[1] for module in modules))
    return [Rows(itemgetter(slice(start, end))) for start, end in zip([0, *ends], ends, strict=False)]


_BY_HEAD = (MultiLinear, QuantizedMultiLinear)


def _head_shape(module: Any) -> tuple[int, int, int]:
    heads, rows, columns = module.weight.shape
    return heads, rows, columns * 32 // module.bits if "scales" in module else columns
