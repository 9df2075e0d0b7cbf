"""Columns of a row that a model's forward takes, as ``transformers.Trainer`` finds them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

# transformers 5.23 ``Trainer._set_signature_columns_if_needed``; default_data_collator makes labels of the first two.
_LABELS = ("label", "label_ids", "labels")


def forward_columns(forward: Callable) -> tuple[str, ...]:
    """The parameters of ``forward``, and the names that labels may have."""
    return tuple(dict.fromkeys([*inspect.signature(forward).parameters, *_LABELS]))


def named_forward(config: Mapping[str, Any]) -> Callable:
    """``forward`` of the transformers class that a config names, or else of Llama's; no weights are read."""
    import transformers

    names = config.get("architectures") or ()
    cls = next((found for name in names if (found := getattr(transformers, name, None))), None)
    return (cls or transformers.LlamaForCausalLM).forward


def is_causal_lm(model: Any) -> bool:
    """Whether ``model``, a transformers model or a PeftModel around one, is of a causal language model's class.

    Anything else has no such class to be asked for, so a name counts as one: loading says what it is.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if not hasattr(model, "forward"):
        return True
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    classes = [cls.__name__ for cls in type(base).__mro__]
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    return any(name in known for name in classes) and not getattr(base.config, "is_encoder_decoder", False)
