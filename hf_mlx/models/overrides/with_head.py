"""What the models that are written here share: a decoder, and a head that may be its embedding."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn


class WithHead(nn.Module):
    """A decoder with its head, which is the decoder's embedding where tied.

    The class attributes name the decoder here, and the embedding and the blocks in it.

    Args:
        args: Of the configuration.
        decoder: Ids (B, T) to hidden states (B, T, H).
    """

    decoder_name, embedding, blocks = "model", "embed_tokens", "layers"

    def __init__(self, args: Any, decoder: nn.Module) -> None:
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self[self.decoder_name] = decoder
        if not args.tie_word_embeddings:
            rows, width = decoder[self.embedding].weight.shape
            self.lm_head = nn.Linear(width, rows, bias=False)

    def __call__(self, inputs: mx.array, cache: Any = None, input_embeddings: mx.array | None = None) -> mx.array:
        decoder = self[self.decoder_name]
        hidden = decoder(inputs, cache, input_embeddings)
        return decoder[self.embedding].as_linear(hidden) if self.args.tie_word_embeddings else self.lm_head(hidden)

    @property
    def layers(self) -> list[Any]:
        """The blocks."""
        return self[self.decoder_name][self.blocks]
