"""Rows that are too long for a model: positions looked up in a table, which ends somewhere; keys chosen among many."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

LEARNED = "the model has learned that many positions (torch raises an IndexError)"
# Up to there mlx-lm attends to all keys, as transformers does; of more, mlx-lm 0.32 chooses others.
CHOSEN = "from there on the model's sparse attention (index_topk) chooses among keys, which mlx-lm does otherwise"


class RowLimit(NamedTuple):
    """How long a row may be.

    Attributes:
        tokens: None is any length.
        why: What a longer row would meet, for messages.
    """

    tokens: int | None = None
    why: str = ""


# HF model type → the key of its config that says how many, its default in transformers 5.23, and why.
_LIMITS = {
    "gpt2": ("n_positions", 1024, LEARNED),
    "gpt_bigcode": ("n_positions", 1024, LEARNED),
    "opt": ("max_position_embeddings", 2048, LEARNED),
    "deepseek_v32": ("index_topk", 2048, CHOSEN),
    "glm_moe_dsa": ("index_topk", 2048, CHOSEN),
}


def row_limit(config: Mapping[str, Any]) -> RowLimit:
    """Of the model of an HF config."""
    if config.get("model_type") not in _LIMITS:
        return RowLimit()
    key, default, why = _LIMITS[config["model_type"]]
    named = config.get(key) or (config.get("max_position_embeddings") if why == LEARNED else None)
    return RowLimit(named or default, why)
