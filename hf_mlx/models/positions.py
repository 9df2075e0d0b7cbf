"""Models that look positions up in a table, which ends somewhere; all others compute them."""

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
