"""Keywords that trainers' constructors took before these settings moved to their configurations."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping
from typing import Any

from ..errors import SettingError
from .legacy import drop

_TOKENIZER = {"tokenizer": "processing_class"}


def _same(names: str) -> dict[str, str]:
    return {name: name for name in names.split()}


# Trainer -> keyword -> the field that has its meaning: trl 0.7 to 0.12, transformers 4.
TRAINER_KEYWORDS: Mapping[str, Mapping[str, str]] = {
    "Trainer": _TOKENIZER,
    "SFTTrainer": _TOKENIZER
    | {"max_seq_length": "max_length"}
    | _same("dataset_text_field packing eval_packing dataset_kwargs dataset_num_proc")
    | _same("neftune_noise_alpha model_init_kwargs"),
    "DPOTrainer": _TOKENIZER
    | _same("beta label_smoothing loss_type max_length truncation_mode disable_dropout precompute_ref_log_probs")
    | _same("dataset_num_proc model_init_kwargs"),
    "RewardTrainer": _TOKENIZER | _same("max_length"),
}
# Gone from the configurations as well.
_GONE_KEYWORDS: Mapping[str, frozenset[str]] = {
    "Trainer": frozenset(),
    "SFTTrainer": frozenset(_same("dataset_batch_size num_of_sequences chars_per_token infinite")),
    "DPOTrainer": frozenset(
        _same("max_prompt_length max_target_length max_completion_length label_pad_token_id padding_value")
        | _same("is_encoder_decoder generate_during_eval reference_free force_use_ref_model ref_model_init_kwargs")
        | _same("model_adapter_name ref_adapter_name")
    ),
    "RewardTrainer": frozenset(),
}
_CONFIGS = {
    "Trainer": "TrainingArguments",
    "SFTTrainer": "SFTConfig",
    "DPOTrainer": "DPOConfig",
    "RewardTrainer": "RewardConfig",
}


def merge_trainer_keywords(
    values: Mapping[str, Any], keywords: Mapping[str, Any], trainer: str = "SFTTrainer", *, stacklevel: int = 3
) -> tuple[dict[str, Any], Any]:
    """Lay a trainer's older constructor keywords over the configuration, with a DeprecationWarning each.

    A keyword that is None was not given. One that is given wins over the configuration, as it did in TRL.

    Args:
        values: Fields that are set already; ``{}`` to get the fields of the keywords alone, which is what
            :func:`~hf_mlx.settings.resolve.resolve_plan` takes as ``overrides``.
        keywords: What the constructor received beyond its own parameters.
        trainer: ``SFTTrainer``, ``DPOTrainer``, ``RewardTrainer`` or ``Trainer``.
        stacklevel: Of the warnings; 3 blames the caller of the function that calls this one.

    Returns:
        The merged fields, and the tokenizer, or None.

    Raises:
        SettingError: A keyword that this trainer never had, or one that is gone and asked for something.
    """
    known, gone = TRAINER_KEYWORDS[trainer], _GONE_KEYWORDS[trainer]
    merged, tokenizer = dict(values), None
    for name, value in keywords.items():
        if name in gone:
            drop(name, value)
        elif name not in known:
            raise _unknown_keyword(name, value, trainer)
        if value is None or name in gone:
            continue
        field = known[name]
        place = "processing_class=" if name == "tokenizer" else f"{_CONFIGS[trainer]}({field}=...)"
        warnings.warn(f"{name}= of {trainer} is deprecated; write {place}", DeprecationWarning, stacklevel=stacklevel)
        if name == "tokenizer":
            tokenizer = value
        else:
            merged[field] = value
    return merged, tokenizer


def _unknown_keyword(name: str, value: Any, trainer: str) -> SettingError:
    known = TRAINER_KEYWORDS[trainer]
    close = difflib.get_close_matches(name, known, n=1)
    return SettingError(
        f"{name}={value!r}",
        f"{name} is a parameter of {trainer}, of this release or an older one ({', '.join(known)})",
        f"write {close[0]}=..." if close else f"remove {name}=, or set it on {_CONFIGS[trainer]}",
    )
