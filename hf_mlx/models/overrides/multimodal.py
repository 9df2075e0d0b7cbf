"""Multimodal types whose text alone trains here, where mlx-lm's module renames tensors amiss.

Names are :mod:`hf_mlx.models.conversions`' matter; mlx-lm's own conversions keep the names that the model has.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models import qwen3_vl_moe


class Model(qwen3_vl_moe.Model):
    """mlx-lm's, whose ``sanitize`` wants a head even of a tied model."""

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """The weights as they are."""
        return weights


def qwen3_vl_moe_classes() -> tuple[type[Any], type]:
    """What builds Qwen3-VL with experts."""
    return Model, qwen3_vl_moe.ModelArgs
