"""The function a step differentiates: parameters and one micro-batch in, loss out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..adapters.dropout import KeyedDropout
from ..models.heads import split_head
from ..models.load import LoadedModel
from ..models.masks import packed_cache
from ..settings.plan import LossPlan
from .loss import TokenSums, token_sums
from .noise import NoisyEmbedding


class Slots:
    """Where each trainable array lives in the model, resolved once so that binding is a plain assignment."""

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self._slots: dict[str, tuple[Any, str | int]] = {}
        for name in names:
            *path, leaf = name.split(".")
            owner: Any = model
            for key in path:
                owner = owner[int(key)] if isinstance(owner, list) else owner[key]
            self._slots[name] = (owner, int(leaf) if isinstance(owner, list) else leaf)

    def bind(self, params: dict[str, mx.array]) -> None:
        """Put ``params`` into the model."""
        for name, value in params.items():
            owner, key = self._slots[name]
            owner[key] = value

    def read(self) -> dict[str, mx.array]:
        """The arrays that are in the model now, in the order of the names."""
        return {name: owner[key] for name, (owner, key) in self._slots.items()}


class Objective:
    """Loss of a micro-batch as a function of the trainable parameters.

    Args:
        loaded: The model, with adapters already attached.
        names: Flat MLX names of what is trained.
        plan: Which loss.
    """

    def __init__(self, loaded: LoadedModel, names: Iterable[str], plan: LossPlan) -> None:
        self.model = loaded.model
        self.plan = plan
        self.slots = Slots(loaded.model, names)
        self._split = split_head(loaded)
        self._dropouts = [module for module in loaded.model.modules() if isinstance(module, KeyedDropout)]
        self._noise = NoisyEmbedding.attach(loaded, plan.neftune_noise_alpha) if plan.neftune_noise_alpha else None

    def __call__(self, params: dict[str, mx.array], arrays: dict[str, mx.array]) -> tuple[mx.array, TokenSums]:
        """Sum of the loss over scored tokens, and all three sums.

        Args:
            params: Flat {MLX name: array}.
            arrays: :attr:`hf_mlx.training.inputs.Inputs.arrays`; in training also ``key`` (2,) uint32, what
                dropout and NEFTune draw from.
        """
        self.slots.bind(params)
        if self.model.training:
            self._bind_keys(arrays)
        sums = token_sums(self._scored_logits(arrays), arrays["targets"], self.plan)
        return sums.loss, sums

    def _bind_keys(self, arrays: dict[str, mx.array]) -> None:
        keys = mx.random.split(arrays["key"], len(self._dropouts) + 1)
        for index, dropout in enumerate(self._dropouts):
            dropout.bind(keys[index + 1])
        if self._noise is not None:
            self._noise.key, self._noise.width = keys[0], arrays["width"]

    def logits(self, arrays: dict[str, mx.array]) -> mx.array:
        """All logits, (B, T, V), of the model as it stands."""
        return self.model(arrays["input_ids"], self._cache(arrays))

    def _scored_logits(self, arrays: dict[str, mx.array]) -> mx.array:
        if self._split is None:
            logits = self.logits(arrays)
            return _scored_rows(logits, arrays)
        backbone, head = self._split
        hidden = backbone(self.model, arrays["input_ids"], self._cache(arrays))
        return head(self.model, _scored_rows(hidden, arrays))

    def _cache(self, arrays: dict[str, mx.array]) -> list | None:
        return packed_cache(self.model, arrays["segments"]) if "segments" in arrays else None


def _scored_rows(x: mx.array, arrays: dict[str, mx.array]) -> mx.array:
    flat = x.reshape(-1, x.shape[-1])
    return flat[arrays["positions"]] if "positions" in arrays else flat
