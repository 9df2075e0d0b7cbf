"""Kimi Linear of a single kind of layers."""

from __future__ import annotations

from typing import Any


def allow_no_attention(model: Any, config: dict[str, Any]) -> None:
    """mlx-lm notes the first attention layer only where there is one, and asks for its mask always."""
    if not hasattr(model.model, "attn_idx"):
        model.model.attn_idx = 0
