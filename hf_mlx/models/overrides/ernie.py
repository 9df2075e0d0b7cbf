"""ERNIE 4.5 mixtures: the router's correction, which mlx-lm drops, and its least sum of weights.

Source: transformers 5.23 ``Ernie4_5_MoeTopKRouter``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models import ernie4_5_moe

_CORRECTION = "e_score_correction_bias"


@dataclass
class ModelArgs(ernie4_5_moe.ModelArgs):
    """mlx-lm's, and the least sum that a token's weights are divided by."""

    moe_norm_min: float = 1e-12


class CorrectedMoE(ernie4_5_moe.Ernie4_5_MoeMLP):
    """Experts are chosen by corrected probabilities and weighted by plain ones.

    Attributes:
        e_score_correction_bias: (1, experts).
    """

    args: ModelArgs
    e_score_correction_bias: mx.array

    def __call__(self, x: mx.array) -> mx.array:
        scores = mx.softmax(self.gate(x).astype(mx.float32), axis=-1)
        corrected = scores + self.e_score_correction_bias[0]
        chosen = mx.stop_gradient(mx.argpartition(-corrected, kth=self.k - 1, axis=-1)[..., : self.k])
        weights = mx.take_along_axis(scores, chosen, axis=-1)
        weights = weights / mx.maximum(weights.sum(axis=-1, keepdims=True), self.args.moe_norm_min)
        y = (self.switch_mlp(x, chosen) * weights.astype(x.dtype)[..., None]).sum(axis=-2)
        return y if self.shared_experts is None else y + self.shared_experts(x)


class Model(ernie4_5_moe.Model):
    """mlx-lm's model with :class:`CorrectedMoE` in its blocks."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args)
        for block in self.layers:
            if isinstance(block.mlp, ernie4_5_moe.Ernie4_5_MoeMLP):
                block.mlp.__class__ = CorrectedMoE
                block.mlp.e_score_correction_bias = mx.zeros((1, args.moe_num_experts))

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """mlx-lm's, which would leave the corrections out."""
        kept: dict[str, Any] = {name: value for name, value in weights.items() if name.endswith(_CORRECTION)}
        return super().sanitize({name: v for name, v in weights.items() if name not in kept}) | kept


def classes() -> tuple[type[Any], type]:
    """What builds it."""
    return Model, ModelArgs
