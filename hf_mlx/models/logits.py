"""What a model's own code does to logits after projecting: scales and softcaps, by model type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn


def read_extras(model_type: str, wrapper: nn.Module) -> dict[str, float] | None:
    """Keywords of :func:`finish_logits`; None where the code does something else to hidden states first."""
    if model_type in _OPAQUE:
        return None
    key = _SCALED.get(model_type)
    if key is None:
        return {}
    field, read = key
    value = read(wrapper)
    return {} if value is None else {field: value}


def finish_logits(
    logits: mx.array,
    multiplier: float | None = None,
    divisor: float | None = None,
    softcap: float | None = None,
) -> mx.array:
    """Scale and softcap, in the order of the model's own code."""
    if multiplier is not None:
        logits = logits * multiplier
    if divisor is not None:
        logits = logits / divisor
    if softcap is not None:
        logits = mx.tanh(logits / softcap) * softcap
    return logits


_SCALED: dict[str, tuple[str, Callable[[Any], float | None]]] = {
    "cohere": ("multiplier", lambda m: m.args.logit_scale),
    "cohere2": ("multiplier", lambda m: m.args.logit_scale),
    "granite": ("divisor", lambda m: m.logits_scaling),
    "granitemoe": ("divisor", lambda m: m.logits_scaling),
    "granitemoehybrid": ("divisor", lambda m: m.logits_scaling),
    "gemma2": ("softcap", lambda m: m.final_logit_softcapping),
    "nanochat": ("softcap", lambda m: m.final_logit_softcapping),
    "gemma4": ("softcap", lambda m: m.final_logit_softcapping),
    "gemma4_text": ("softcap", lambda m: m.final_logit_softcapping),
}
# Heads that do more than project, scale and cap; their logits are computed in full.
_OPAQUE = frozenset({"gpt_neox", "minicpm3", "falcon_h1", "recurrent_gemma", "laguna"})
