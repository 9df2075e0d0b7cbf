"""A causal LM in two parts, hidden states and vocabulary projection, so that a loss need not hold all logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .load import LoadedModel, module_at
from .logits import finish_logits, read_extras

Backbone = Callable[..., mx.array]


@dataclass(frozen=True)
class Head:
    """The vocabulary projection of a model; logits = softcap(scale(hidden @ weight.T + bias)).

    Attributes:
        path: Module path of the projection: the head, or the input embedding where tied.
        tied: Whether ``path`` is the input embedding.
        multiplier: Logits are multiplied by it (Cohere's logit_scale), or None.
        divisor: Logits are divided by it (Granite's logits_scaling), or None.
        softcap: Logits become ``tanh(x / softcap) * softcap`` (Gemma 2), or None.
    """

    path: str
    tied: bool
    multiplier: float | None = None
    divisor: float | None = None
    softcap: float | None = None

    def module(self, model: nn.Module) -> Any:
        """The module that projects: Linear or Embedding, possibly quantised or wrapped by an adapter."""
        return module_at(model, self.path)

    def project(self, model: nn.Module, hidden: mx.array) -> mx.array:
        """Raw logits (…, V) of hidden states (…, H), before :meth:`finish`."""
        module = self.module(model)
        return module.as_linear(hidden) if self.tied else module(hidden)

    def finish(self, logits: mx.array) -> mx.array:
        """Scale and softcap, in the order of the model's own code."""
        return finish_logits(logits, self.multiplier, self.divisor, self.softcap)

    def __call__(self, model: nn.Module, hidden: mx.array) -> mx.array:
        """Logits (…, V), equal bit for bit to the model's own."""
        return self.finish(self.project(model, hidden))


def split_head(loaded: LoadedModel) -> tuple[Backbone, Head] | None:
    """Splits a model, or gives None where its code does not divide there.

    Returns:
        ``backbone(model, input_ids, cache=None, input_embeddings=None)`` → hidden (B, T, H), and the head.
        Neither holds the model, so both may be used inside ``mx.compile`` and after adapters were attached.
    """
    prefix, inner = model_parts(loaded.model)
    wrapper = module_at(loaded.model, prefix)
    if inner is None:
        return None
    if "lm_head" in wrapper and not ties_head(wrapper):
        head_path, tied = "lm_head", False
    else:
        embedding = _embedding(wrapper[inner])
        if embedding is None:
            return None
        head_path, tied = f"{inner}.{embedding}", True
    extras = read_extras(loaded.model_type, wrapper)
    if extras is None:
        return None
    head = Head(_join(prefix, head_path), tied, **extras)
    path = _join(prefix, inner)

    def backbone(
        model: nn.Module, input_ids: mx.array, cache: Any = None, input_embeddings: mx.array | None = None
    ) -> mx.array:
        module = module_at(model, path)
        # By name: in some of mlx-lm's models the second argument is a mask that nothing reads.
        if input_embeddings is None:
            return module(input_ids, cache=cache)
        return module(input_ids, cache=cache, input_embeddings=input_embeddings)

    return backbone, head


def layers(model: Any) -> list[nn.Module]:
    """The transformer blocks of an mlx-lm model, first to last."""
    return model.layers


def trained_arrays(module: nn.Module) -> dict[str, mx.array]:
    """What trains in ``module``, by its path there."""
    found: Any = tree_flatten(module.trainable_parameters())
    return dict(found)


def embedding_path(model: nn.Module) -> str:
    """Module path of the input embedding."""
    prefix, inner = model_parts(model)
    root = module_at(model, prefix)
    name = _embedding(root[inner]) if inner else None
    if inner is None or name is None:
        raise TypeError(f"{type(model).__name__} has no input embedding where mlx-lm models keep it")
    return _join(_join(prefix, inner), name)


def embed(model: nn.Module, input_ids: mx.array) -> mx.array:
    """The input embedding (B, T, H) of ids, before any scale the model applies to it."""
    return module_at(model, embedding_path(model))(input_ids)


def _join(*parts: str) -> str:
    return ".".join(p for p in parts if p)


def model_parts(model: nn.Module) -> tuple[str, str | None]:
    """Path of the module that owns the head, and the name of the decoder stack below it (None: not known)."""
    prefix = "language_model" if "language_model" in model else ""
    root = module_at(model, prefix)
    return prefix, next((n for n in ("model", "transformer", "backbone") if n in root), None)


def _embedding(inner: nn.Module) -> str | None:
    names = ("embed_tokens", "wte", "embeddings", "tok_embeddings", "word_embeddings", "embed_in")
    return next((n for n in names if n in inner), None)


def ties_head(wrapper: nn.Module) -> bool:
    """Whether the module that would own a head projects with the embedding."""
    args = getattr(wrapper, "args", None)
    # A tied model may still own an unused head (Helium).
    return bool(getattr(wrapper, "tie_word_embeddings", getattr(args, "tie_word_embeddings", False)))
