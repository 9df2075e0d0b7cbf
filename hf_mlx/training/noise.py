"""NEFTune: uniform noise on the embedding output while training."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ..adapters.draws import draw_by_row
from ..models.heads import embedding_path, module_at
from ..models.load import LoadedModel


class NoisyEmbedding:
    """Adds uniform noise of magnitude ``alpha / sqrt(L * d)`` to what the input embedding returns.

    Source: transformers 5.23, ``integrations.neftune.neftune_post_forward_hook``. L is the padded row length of
    the batch, d the embedding width. The draws are MLX's own; torch's cannot be reproduced.

    Attributes:
        width: L of the batch at hand as a scalar array, bound before each micro-batch.
        keys: What the noise is drawn from, (B, 2) uint32: one for each row.
    """

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha
        self.width: mx.array | None = None
        self.keys: mx.array | None = None

    @classmethod
    def attach(cls, loaded: LoadedModel, alpha: float) -> NoisyEmbedding:
        """Give the model's input embedding the noise, on the instance alone."""
        noise = cls(alpha)
        embedding = module_at(loaded.model, embedding_path(loaded.model))
        base = type(embedding)

        def call(self: nn.Module, ids: mx.array) -> mx.array:
            output = base.__call__(self, ids)
            return noise.add(output) if self.training else output

        embedding.__class__ = type(f"NEFTune{base.__name__}", (base,), {"__call__": call})
        return noise

    def add(self, output: mx.array) -> mx.array:
        """``output`` (B, T, d) plus noise, in its own dtype."""
        if self.width is None or self.keys is None:
            raise RuntimeError("NEFTune needs the row length and the keys of the batch at hand")
        magnitude = self.alpha / mx.sqrt(self.width * output.shape[-1])
        noise = draw_by_row(lambda shape, key: mx.random.uniform(-1.0, 1.0, shape, key=key), output.shape, self.keys)
        return output + (noise * magnitude).astype(output.dtype)
