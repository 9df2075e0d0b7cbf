"""A forward pass without gradients, from whatever ids come as to logits of the same kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import SettingError
from ..models.architectures import can_pack
from ..models.load import LoadedModel
from .generation import like, read_ids


@dataclass
class CausalLMOutput:
    """Output of a forward pass.

    Attributes:
        logits: (B, T, V) float32; a torch tensor if torch tensors came in, else numpy.
        loss: Mean over the labelled next tokens, or None without labels.
    """

    logits: Any
    loss: Any = None


def run_forward(loaded: LoadedModel, input_ids: Any, attention_mask: Any, labels: Any) -> CausalLMOutput:
    """Logits, and the loss where there are labels.

    Raises:
        SettingError: Padding on the left of a model whose positions are absolute.
    """
    ids = read_ids(input_ids)
    shifts = np.zeros(len(ids), int)
    if attention_mask is not None:
        shifts = read_ids(attention_mask).astype(bool).argmax(axis=1)
    if shifts.any() and not can_pack(loaded.model_type):
        raise SettingError(
            f"an attention_mask that starts with zeros, for model type {loaded.model_type!r}",
            "padding on the right",
            'tokenizer(..., padding_side="right")',
        )
    # With relative positions a row may begin anywhere: let each begin at its first real token.
    rolled = np.stack([np.roll(row, -shift) for row, shift in zip(ids, shifts, strict=True)])
    raw = np.array(loaded.model(mx.array(rolled)).astype(mx.float32))
    logits = np.stack([np.roll(row, shift, axis=0) for row, shift in zip(raw, shifts, strict=True)])
    if labels is None:
        return CausalLMOutput(like(input_ids, logits))
    loss = np.array(_mean_loss(logits, read_ids(labels)), np.float32)
    return CausalLMOutput(like(input_ids, logits), like(input_ids, loss))


def _mean_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    targets = labels[:, 1:]
    scored = targets != -100
    rows = logits[:, :-1][scored].astype(np.float64)
    top = rows.max(axis=-1, keepdims=True)
    log_sum = np.log(np.exp(rows - top).sum(axis=-1)) + top[:, 0]
    return float((log_sum - rows[np.arange(len(rows)), targets[scored]]).mean())
