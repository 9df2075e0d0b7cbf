"""The row of the input embedding that torch never trains by lookups: ``nn.Embedding(padding_idx=pad_token_id)``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from .torch_wrappers import unwrap

# Types whose class in transformers 5.23 makes its input embedding without padding_idx.
_NONE = frozenset(
    {"falcon", "gpt2", "gpt_bigcode", "gpt_neox", "gptj", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
)


def named_padding_row(config: Mapping[str, Any]) -> int | None:
    """The row of a model that is built from its config.

    Args:
        config: As transformers reads it, with the defaults of its class.
    """
    text = config.get("text_config") or config
    return None if config["model_type"] in _NONE else text.get("pad_token_id")


def torch_padding_row(base: Any) -> int | None:
    """The row of a transformers model at hand, whatever its config says by now."""
    return getattr(unwrap(base.get_input_embeddings()), "padding_idx", None)


def without_gradient(rows: mx.array, held: mx.array) -> mx.array:
    """``rows`` (..., d), constants where ``held`` (...) is True."""
    return mx.where(held[..., None], mx.stop_gradient(rows), rows)
