"""A head of its own for the classes of mlx-lm 0.32 that only project with the embedding.

transformers ties these by default and unties them where the config says so, or where PEFT trains one end.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..logits import finish_logits, read_extras

# model type → name of the embedding in ``model.model``.
EMBEDDINGS = {
    **dict.fromkeys(("cohere", "cohere2", "gemma", "gemma2", "lfm2", "lfm2_moe"), "embed_tokens"),
    "gpt2": "wte",
}


@cache
def projecting(base: type[Any], model_type: str) -> type[Any]:
    """A subclass that projects with its ``lm_head``."""

    class OwnHead(base):
        def __call__(self, inputs: mx.array, cache: Any = None, input_embeddings: mx.array | None = None) -> mx.array:
            given = {} if input_embeddings is None else {"input_embeddings": input_embeddings}
            logits = self.lm_head(self.model(inputs, cache=cache, **given))
            return finish_logits(logits, **(read_extras(model_type, self) or {}))

    OwnHead.__name__ = f"OwnHead{base.__name__}"
    return OwnHead


@cache
def building(base: type[Any], model_type: str) -> type[Any]:
    """A subclass of :func:`projecting`'s that is built with a head, for a checkpoint that stores one."""

    class BuiltWithHead(projecting(base, model_type)):
        def __init__(self, args: Any) -> None:
            super().__init__(args)
            rows, width = self.model[EMBEDDINGS[model_type]].weight.shape
            self.lm_head = nn.Linear(width, rows, bias=False)

    BuiltWithHead.__name__ = f"BuiltWithHead{base.__name__}"
    return BuiltWithHead
