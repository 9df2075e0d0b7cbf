"""LoRA and DoRA around a frozen base layer, with PEFT's orientation and dtype rules.

Every layer keeps its base under ``base_layer`` and fp32 masters in PEFT's shapes, so exporting is renaming.
The low-rank path computes in ``compute_dtype`` (the autocast dtype, or fp32 without autocast) and the sum
returns in the dtype of the base's output, as ``peft.tuners.lora.layer.Linear.forward`` (peft 0.21) does.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from ..models.blockwise import BlockLinear
from ..models.padding_row import without_gradient
from ..models.products import matmul
from ..models.sums import add_bias
from .dropout import KeyedDropout
from .low_rank import add_low_rank, scaled


def dense_weight(layer: Any) -> mx.array:
    """The layer's weight as floating-point numbers, dequantised where the layer is quantised."""
    if "scales" not in layer:
        return layer.weight
    if isinstance(layer, BlockLinear):
        return layer.dense_weight()
    return mx.dequantize(
        layer.weight,
        layer.scales,
        layer.get("biases"),
        group_size=layer.group_size,
        bits=layer.bits,
        mode=layer.mode,
    )


def layer_dims(layer: Any) -> tuple[int, int]:
    """(input features, output features) of a Linear, an Embedding or one expert, quantised or not."""
    if isinstance(layer, (SwitchLinear, QuantizedSwitchLinear)):
        return layer.input_dims, layer.output_dims
    rows, columns = layer.weight.shape
    if "scales" in layer:
        columns = columns * 32 // layer.bits
    # An embedding maps a token (one of `rows`) to a vector; a Linear stores (out, in).
    return (rows, columns) if isinstance(layer, (nn.Embedding, nn.QuantizedEmbedding)) else (columns, rows)


class LoRALinear(nn.Module):
    """A Linear (plain, cast or quantised) plus ``scale · B A x``.

    Args:
        base_layer: The layer to adapt; freezing it is the caller's business.
        r: Rank.
        scale: alpha / r, or alpha / √r with rslora.
        dropout: Probability of dropping an input of the low-rank path while training.
        bias: Adds the trainable ``lora_B.bias`` of ``LoraConfig(lora_bias=True)``.
        compute_dtype: Dtype of the two matmuls.
        dims: (in, out) of the torch layer, where ``base_layer`` is a part of it.

    Attributes:
        lora_A: (r, in), fp32.
        lora_B: (out, r), fp32.
        lora_B_bias: (out,), fp32; only with ``bias``.
    """

    def __init__(
        self,
        base_layer: Any,
        r: int,
        scale: float,
        dropout: float = 0.0,
        bias: bool = False,
        compute_dtype: mx.Dtype = mx.float32,
        dims: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        inputs, outputs = dims or layer_dims(base_layer)
        self.base_layer = base_layer
        self.scale = scale
        self.compute_dtype = compute_dtype
        if dropout > 0:
            self.lora_dropout = KeyedDropout(dropout)
        self.lora_A = mx.zeros((r, inputs))
        self.lora_B = mx.zeros((outputs, r))
        if bias:
            self.lora_B_bias = mx.zeros((outputs,))

    def computed_in(self) -> dict[str, mx.Dtype]:
        """The arrays that a forward pass only reads cast, and their dtype then."""
        # Dropout looks at the adapter's own dtype.
        return {} if "lora_dropout" in self else dict.fromkeys(("lora_A", "lora_B"), self.compute_dtype)

    def _dropped(self, x: mx.array) -> mx.array:
        if "lora_dropout" not in self or not self.training:
            return x
        # PEFT casts x to the adapter's dtype before it drops.
        return self.lora_dropout(x.astype(self.lora_A.dtype))

    def _low_rank(self, x: mx.array) -> mx.array:
        dtype = self.compute_dtype
        out = matmul(matmul(x.astype(dtype), self.lora_A.astype(dtype).T), self.lora_B.astype(dtype).T)
        return add_bias(out, self.lora_B_bias.astype(dtype)) if "lora_B_bias" in self else out

    def __call__(self, x: mx.array) -> mx.array:
        if self._fuses():
            dtype = self.compute_dtype
            a, b = self.lora_A.astype(dtype), self.lora_B.astype(dtype)
            return add_low_rank(self.base_layer, x.astype(dtype), a, b, self.scale)
        base = self.base_layer(x)
        return (base + scaled(self._low_rank(self._dropped(x)), self.scale)).astype(base.dtype)

    @property
    def orders_backward(self) -> bool:
        """Whether the gradient of the input waits for those of the adapter."""
        return self._fuses()

    def _fuses(self) -> bool:
        """Whether both paths read one x in one low precision; fp32 keeps PEFT's order of operations."""
        drops = "lora_dropout" in self and self.training
        plain = not drops and "lora_B_bias" not in self and not self.base_layer.trainable_parameters()
        return plain and self.compute_dtype != mx.float32

    def delta(self) -> mx.array:
        """What merging adds to the base weight: ``scale · B A``, (out, in), fp32."""
        return (self.lora_B @ self.lora_A) * self.scale

    def merged_weight(self) -> mx.array:
        """Base weight with the adapter folded in, (out, in), in the base's dtype."""
        weight = dense_weight(self.base_layer)
        return (weight + self.delta()).astype(weight.dtype)


class DoRALinear(LoRALinear):
    """LoRA whose rows are rescaled to a learned magnitude; the norm is detached.

    Source: peft 0.21 ``DoraLinearLayer.forward``: the output gains
    ``(m/‖W+sBA‖ − 1)·(W x) + (m/‖W+sBA‖)·s·BAx``, with the base's bias kept out of it.

    Attributes:
        lora_magnitude_vector: (out,), fp32.
    """

    @property
    def orders_backward(self) -> bool:
        """False: its gradients come in MLX's order."""
        return False

    def __init__(self, base_layer: Any, r: int, scale: float, **options) -> None:
        super().__init__(base_layer, r, scale, **options)
        self.lora_magnitude_vector = mx.ones((layer_dims(base_layer)[1],))

    def weight_norm(self) -> mx.array:
        """Row norms of W + scale·BA, (out,), fp32, outside the gradient."""
        # The product runs in the compute dtype, as PEFT's does under autocast.
        dtype = self.compute_dtype
        delta = matmul(self.lora_B.astype(dtype), self.lora_A.astype(dtype)).astype(mx.float32)
        return mx.stop_gradient(mx.linalg.norm(dense_weight(self.base_layer) + self.scale * delta, axis=1))

    def reset_magnitude(self) -> None:
        """Start from the base's own norms, so that the first forward changes nothing."""
        delta = self.lora_B @ self.lora_A
        self.lora_magnitude_vector = mx.linalg.norm(dense_weight(self.base_layer) + self.scale * delta, axis=1)

    def __call__(self, x: mx.array) -> mx.array:
        base = self.base_layer(x)
        dropped = self._dropped(x)
        # With dropout active PEFT recomputes W x from the dropped input.
        linear = base if dropped is x else self.base_layer(dropped.astype(x.dtype))
        if "bias" in self.base_layer:
            linear = linear - self.base_layer.bias
        ratio = self.lora_magnitude_vector / self.weight_norm()
        change = (ratio - 1) * linear + ratio * self._low_rank(dropped) * self.scale
        return (base + change).astype(base.dtype)

    def merged_weight(self) -> mx.array:
        weight = dense_weight(self.base_layer)
        full = weight + self.delta()
        norm = mx.linalg.norm(full, axis=1)
        return ((self.lora_magnitude_vector / norm)[:, None] * full).astype(weight.dtype)


class LoRAEmbedding(nn.Module):
    """An Embedding plus ``scale · B A[:, token]``; PEFT applies no dropout here.

    Attributes:
        lora_embedding_A: (r, vocabulary), fp32.
        lora_embedding_B: (dim, r), fp32.
        padding_row: Token whose column of A gets no gradient, or None.
    """

    padding_row: int | None = None

    def __init__(self, base_layer: Any, r: int, scale: float, compute_dtype: mx.Dtype = mx.float32) -> None:
        super().__init__()
        tokens, dim = layer_dims(base_layer)
        self.base_layer = base_layer
        self.scale = scale
        self.compute_dtype = compute_dtype
        self.lora_embedding_A = mx.zeros((r, tokens))
        self.lora_embedding_B = mx.zeros((dim, r))

    def __call__(self, x: mx.array) -> mx.array:
        base = self.base_layer(x)
        dtype = self.compute_dtype
        columns = self.lora_embedding_A.T[x]
        if self.padding_row is not None:
            columns = without_gradient(columns, x == self.padding_row)
        low = matmul(columns.astype(dtype), self.lora_embedding_B.astype(dtype).T)
        return (base + scaled(low, self.scale)).astype(base.dtype)

    def delta(self) -> mx.array:
        """What merging adds to the base weight, (vocabulary, dim), fp32."""
        return (self.lora_embedding_B @ self.lora_embedding_A).T * self.scale

    def merged_weight(self) -> mx.array:
        """Base weight with the adapter folded in, (vocabulary, dim), in the base's dtype."""
        weight = dense_weight(self.base_layer)
        return (weight + self.delta()).astype(weight.dtype)
