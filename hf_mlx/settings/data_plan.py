"""How rows become tokens: SFTConfig's data settings, checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import SettingError
from .plan import DataPlan
from .ranges import check_count, check_flag, check_optional_count, check_text


def resolve_data(values: Mapping[str, Any]) -> DataPlan:
    """Formats, truncation, packing and masks.

    Raises:
        SettingError: A length or count is out of range, or two settings contradict each other.
    """
    max_length = _resolve_max_length(values)
    multiple = values["pad_to_multiple_of"]
    return DataPlan(
        dataset_text_field=check_text("dataset_text_field", values["dataset_text_field"], 'dataset_text_field="text"'),
        max_length=max_length,
        truncation_mode=values["truncation_mode"],
        packing=check_flag("packing", values["packing"]),
        packing_strategy="bfd_split" if values["packing_strategy"] == "bfd-requeue" else values["packing_strategy"],
        eval_packing=_optional_flag(values, "eval_packing"),
        padding_free=check_flag("padding_free", values["padding_free"]),
        pad_to_multiple_of=None
        if multiple in (None, "auto")
        else check_count("pad_to_multiple_of", multiple, "pad_to_multiple_of=8"),
        completion_only_loss=_optional_flag(values, "completion_only_loss"),
        assistant_only_loss=check_flag("assistant_only_loss", values["assistant_only_loss"]),
        eos_token=values["eos_token"],
        pad_token=values["pad_token"],
        chat_template_path=None if values["chat_template_path"] is None else str(values["chat_template_path"]),
        shuffle_dataset=check_flag("shuffle_dataset", values["shuffle_dataset"]),
        dataset_num_proc=check_optional_count("dataset_num_proc", values["dataset_num_proc"], "dataset_num_proc=4"),
        skip_prepare_dataset=check_flag(
            "skip_prepare_dataset", (values["dataset_kwargs"] or {}).get("skip_prepare_dataset", False)
        ),
        seed=int(values["seed"]),
    )


def _resolve_max_length(values: Mapping[str, Any]) -> int | None:
    max_length = values["max_length"]
    packing = values["packing"] or values["eval_packing"]
    if max_length is None and packing:
        raise SettingError(
            "max_length=None with packing=True",
            "packing fills sequences of max_length tokens",
            "write max_length=1024",
        )
    if max_length is not None and values["padding_free"] and not values["packing"]:
        raise SettingError(
            f"padding_free=True, packing=False, max_length={max_length!r}",
            "without packing, padding_free rows are not cut, so max_length would have no effect (TRL raises too)",
            "write packing=True, or max_length=None with rows that are short enough",
        )
    return resolve_length(max_length)


def resolve_length(max_length: Any) -> int | None:
    """``max_length``: the first token of a row has no label, so a row of one token trains nothing."""
    return check_optional_count("max_length", max_length, "max_length=1024, or None for whole rows", low=2)


def _optional_flag(values: Mapping[str, Any], name: str) -> bool | None:
    return None if values[name] is None else check_flag(name, values[name])
