"""The padding row of an input embedding gets no gradient from lookups, as under torch."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..adapters.layers import LoRAEmbedding
from ..models.heads import embedding_path, module_at
from ..models.load import LoadedModel
from ..models.padding_row import without_gradient
from ..models.vocabulary import count_rows


def hold_padding_row(loaded: LoadedModel) -> None:
    """Leave ``loaded.padding_row`` out of the gradient of what is trained in the input embedding, on the instance.

    A head that is the embedding trains the row by its logits, as in torch.

    Source: torch 2.13 ``nn.functional.embedding``, which peft 0.21 calls with the base's ``padding_idx`` for
    ``lora_embedding_A`` and trained rows; ``lora_embedding_B`` learns of padding all the same.
    """
    if loaded.padding_row is None:
        return
    try:
        path = embedding_path(loaded.model)
    except TypeError:
        return
    # torch counts a negative one from the end.
    row = loaded.padding_row % count_rows(loaded)
    owner = module_at(loaded.model, path.rpartition(".")[0])
    # Gemma 4 looks tokens up in a second table, of vectors for each layer.
    for embedding in (module_at(loaded.model, path), owner.get("embed_tokens_per_layer")):
        if embedding is not None and embedding.trainable_parameters():
            _hold(embedding, row)


def _hold(embedding: nn.Module, row: int) -> None:
    if isinstance(embedding, LoRAEmbedding):
        embedding.padding_row = row
        return
    base: Any = type(embedding)

    def call(self: nn.Module, ids: mx.array) -> mx.array:
        return without_gradient(base.__call__(self, ids), ids == row)

    embedding.__class__ = type(base.__name__, (base,), {"__call__": call})
