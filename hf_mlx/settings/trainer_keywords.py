"""Keywords of older ``SFTTrainer`` constructors, which are fields of its configuration today."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping
from typing import Any

from ..errors import SettingError
from .legacy import drop

# Keywords that SFTTrainer's constructor took before they moved to SFTConfig (tokenizer= until trl 0.12,
# dataset_text_field= until 0.15, the others until 0.13) -> the field that has their meaning.
TRAINER_KEYWORDS: Mapping[str, str] = {
    "tokenizer": "processing_class",
    "max_seq_length": "max_length",
    "dataset_text_field": "dataset_text_field",
    "packing": "packing",
    "eval_packing": "eval_packing",
    "dataset_kwargs": "dataset_kwargs",
    "dataset_num_proc": "dataset_num_proc",
    "neftune_noise_alpha": "neftune_noise_alpha",
    "model_init_kwargs": "model_init_kwargs",
}
_DROPPED_KEYWORDS = ("dataset_batch_size", "num_of_sequences", "chars_per_token", "infinite")


def merge_trainer_keywords(
    values: Mapping[str, Any], keywords: Mapping[str, Any], *, stacklevel: int = 3
) -> tuple[dict[str, Any], Any]:
    """Lay SFTTrainer's older constructor keywords over the configuration, with a DeprecationWarning each.

    A keyword that is None was not given. One that is given wins over the configuration, as it did in TRL.

    Args:
        values: Fields that are set already; ``{}`` to get the fields of the keywords alone, which is what
            :func:`~hf_mlx.settings.resolve.resolve_plan` takes as ``overrides``.
        keywords: What the constructor received beyond its own parameters.
        stacklevel: Of the warnings; 3 blames the caller of the function that calls this one.

    Returns:
        The merged fields, and the tokenizer, or None.

    Raises:
        SettingError: A keyword that SFTTrainer never had, or one that is gone and asked for something.
    """
    merged, tokenizer = dict(values), None
    for name, value in keywords.items():
        if name in _DROPPED_KEYWORDS:
            drop(name, value)
        elif name not in TRAINER_KEYWORDS:
            raise _unknown_keyword(name, value)
        if value is None or name in _DROPPED_KEYWORDS:
            continue
        field = TRAINER_KEYWORDS[name]
        place = "processing_class=" if name == "tokenizer" else f"SFTConfig({field}=...)"
        warnings.warn(f"{name}= of SFTTrainer is deprecated; write {place}", DeprecationWarning, stacklevel=stacklevel)
        if name == "tokenizer":
            tokenizer = value
        else:
            merged[field] = value
    return merged, tokenizer


def _unknown_keyword(name: str, value: Any) -> SettingError:
    close = difflib.get_close_matches(name, TRAINER_KEYWORDS, n=1)
    return SettingError(
        f"{name}={value!r}",
        f"{name} is a parameter of SFTTrainer, of this release or an older one ({', '.join(TRAINER_KEYWORDS)})",
        f"write {close[0]}=..." if close else f"remove {name}=, or set it on SFTConfig",
    )
