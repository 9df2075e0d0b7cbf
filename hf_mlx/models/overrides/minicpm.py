"""MiniCPM3 as transformers 5.23 ``modeling_minicpm3`` computes it."""

from __future__ import annotations

from functools import cache as once
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .norms import use_default_latent_epsilon


def correct(model: Any, config: dict[str, Any]) -> None:
    """Plain rotary embeddings where there are no long factors, the latent norms' epsilon, and the tied head's scale."""
    use_default_latent_epsilon(model, config)
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    if rope.get("rope_type", rope.get("type", "default")) == "default":
        for block in model.layers:
            base = rope.get("rope_theta") or config["rope_theta"]
            block.self_attn.rope = nn.RoPE(config["qk_rope_head_dim"], traditional=False, base=base)
    model.__class__ = _scaled(type(model))


@once
def _scaled(base: type[Any]) -> type[Any]:
    class Scaled(base):
        def __call__(self, inputs: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
            if not self.args.tie_word_embeddings:
                return super().__call__(inputs, mask, cache)
            hidden = self.model(inputs, mask, cache) / (self.args.hidden_size / self.args.dim_model_base)
            return self.model.embed_tokens.as_linear(hidden)

    Scaled.__name__ = f"Scaled{base.__name__}"
    return Scaled
