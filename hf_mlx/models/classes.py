"""The classes that mlx-lm builds a model of, with our own layout of its weights."""

from __future__ import annotations

import importlib
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .config import Config


def mlx_classes(model_type: str) -> tuple[type[nn.Module], type]:
    """mlx-lm's (Model, ModelArgs) of a model type."""
    from mlx_lm.utils import MODEL_REMAPPING

    module = importlib.import_module(f"mlx_lm.models.{MODEL_REMAPPING.get(model_type, model_type)}")
    return module.Model, module.ModelArgs


def with_layout(base: type[Any], steps: tuple, config: Config) -> type[nn.Module]:
    """A subclass whose ``sanitize`` is our reversible steps, so that what is loaded can be written back."""
    tied = config.get("tie_word_embeddings", False)

    class Model(base):
        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            # Tied checkpoints of older libraries still store the head; precomputed rotary tables are not weights.
            weights = {
                k: v
                for k, v in weights.items()
                if not k.endswith("rotary_emb.inv_freq") and not (tied and k.endswith("lm_head.weight"))
            }
            for step in steps:
                weights = step.load(weights)
            return super().sanitize(weights) if hasattr(base, "sanitize") else weights

    Model.__qualname__ = base.__qualname__
    return Model
