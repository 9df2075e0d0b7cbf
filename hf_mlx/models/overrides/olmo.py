"""OLMo: a Llama whose norms have no weight. mlx-lm's module of this name needs another library, and is for its files.

Source: transformers 5.23 ``modeling_olmo``.
"""

from __future__ import annotations

from typing import Any

import mlx.nn as nn
from mlx_lm.models import llama


class Model(llama.Model):
    """mlx-lm's Llama with OLMo's norms."""

    def __init__(self, args: llama.ModelArgs) -> None:
        super().__init__(args)
        inner: Any = self.model
        inner.norm = _norm(args)
        for block in inner.layers:
            block.input_layernorm, block.post_attention_layernorm = _norm(args), _norm(args)


def classes() -> tuple[type[Any], type]:
    """What builds it."""
    return Model, llama.ModelArgs


def _norm(args: llama.ModelArgs) -> nn.LayerNorm:
    return nn.LayerNorm(args.hidden_size, eps=1e-5, affine=False)
