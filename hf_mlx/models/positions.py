"""Rows that are too long for a model: positions looked up in a table, which ends somewhere; keys chosen among many."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# HF model type → the key of its config that says how many rows the table has, and its default in transformers 5.23.
_LEARNED = {
    "gpt2": ("n_positions", 1024),
    "gpt_bigcode": ("n_positions", 1024),
    "opt": ("max_position_embeddings", 2048),
}


def learned_positions(config: Mapping[str, Any]) -> int | None:
    """Positions that the model of an HF config can embed; None where it computes them."""
    if config.get("model_type") not in _LEARNED:
        return None
    key, default = _LEARNED[config["model_type"]]
    return config.get(key) or config.get("max_position_embeddings") or default


# HF model type → the key of its config that says how many keys a query attends to, and its default (transformers 5.23).
# Up to there mlx-lm attends to all of them, as transformers does; of more, mlx-lm 0.32 chooses others.
_CHOSEN = {
    "deepseek_v32": ("index_topk", 2048),
    "glm_moe_dsa": ("index_topk", 2048),
}


def chosen_keys(config: Mapping[str, Any]) -> int | None:
    """Tokens of a row of which each attends to all before it; None where there is no choice."""
    if config.get("model_type") not in _CHOSEN:
        return None
    key, default = _CHOSEN[config["model_type"]]
    return config.get(key) or default
