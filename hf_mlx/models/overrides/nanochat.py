"""nanochat: a Llama whose norms have no weight, whose heads turn backwards and are normed, and whose logits are capped.

Source: transformers 5.23 ``modeling_nanochat``. mlx-lm's module of this name reads nanochat's own files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama

from ..cpu_norms import rms_norm
from ..logits import finish_logits
from .activations import ACTIVATIONS
from .llama import blocks_of
from .norms import NormedRope


@dataclass
class ModelArgs(llama.ModelArgs):
    """mlx-lm's, the activation, and the cap."""

    hidden_act: str = "relu2"
    final_logit_softcapping: float | None = None


class PlainRMSNorm(nn.Module):
    """x / rms(x)."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        return rms_norm(x, None, self.eps)


class MLP(nn.Module):
    """fc2(act(fc1(x)))."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.fc1 = nn.Linear(args.hidden_size, args.intermediate_size, bias=False)
        self.fc2 = nn.Linear(args.intermediate_size, args.hidden_size, bias=False)
        self.activation = args.hidden_act

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class NanoChatModel(llama.LlamaModel):
    """mlx-lm's, with a norm of the embeddings."""

    def __call__(self, inputs: mx.array, cache: Any = None, input_embeddings: mx.array | None = None) -> mx.array:
        embedded = self.embed_tokens(inputs) if input_embeddings is None else input_embeddings
        return super().__call__(inputs, cache, self.norm(embedded))


class Model(llama.Model):
    """mlx-lm's Llama with these parts."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args)
        inner: Any = NanoChatModel(args)
        inner.norm = PlainRMSNorm(args.rms_norm_eps)
        self.model, self.final_logit_softcapping = inner, args.final_logit_softcapping
        for block in blocks_of(self):
            block.mlp = MLP(args)
            block.input_layernorm = PlainRMSNorm(args.rms_norm_eps)
            block.post_attention_layernorm = PlainRMSNorm(args.rms_norm_eps)

    def __call__(self, inputs: mx.array, cache: Any = None, input_embeddings: mx.array | None = None) -> mx.array:
        logits = super().__call__(inputs, cache, input_embeddings)
        return finish_logits(logits, softcap=self.final_logit_softcapping)


def classes() -> tuple[type[Any], type]:
    """What builds it."""
    return Model, ModelArgs


def turn_backwards(model: Any, config: dict[str, Any]) -> None:
    """Rotary embeddings of the opposite sign, and the heads' norm after them."""
    for block in model.layers:
        rope = block.self_attn.rope
        if isinstance(rope, nn.RoPE):
            rope.scale = -rope.scale
        else:
            rope._freqs = -rope._freqs
        block.self_attn.rope = NormedRope(rope, config["rms_norm_eps"])
