"""Rows that arrive as token ids, with labels or masks of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .faults import RowFault, drop_row, show
from .masks import apply_mask

Rows = list[list[int]]


def read_tokens(columns: Mapping[str, Sequence[Any]], completion_only: bool) -> tuple[Rows, Rows]:
    """Token ids and labels of tokenized rows.

    Labels are taken as they are; without them, masks decide: ``assistant_masks`` always, ``completion_mask`` when
    completions alone train (trl 1.16 ``SFTTrainer._prepare_dataset``, ``build_labels``).

    Raises:
        RowFault: Values that are no integers, or columns of unequal lengths.
    """
    ids = [_read_row(row, "input_ids", number) for number, row in enumerate(columns["input_ids"])]
    if "labels" in columns:
        labels = [_read_row(row, "labels", number) for number, row in enumerate(columns["labels"])]
        _check_lengths(ids, labels, "labels")
        return ids, labels
    used = [name for name in ("completion_mask", "assistant_masks") if name in columns]
    labels = ids
    for name in used:
        masks = [_check_bits(_read_row(row, name, number), name, number) for number, row in enumerate(columns[name])]
        _check_lengths(ids, masks, name)
        if name == "assistant_masks" or completion_only:
            labels = [apply_mask(row, bits) for row, bits in zip(labels, masks, strict=True)]
    return ids, labels


def _read_row(row: Any, column: str, number: int) -> list[int]:
    values = row.tolist() if hasattr(row, "tolist") else row
    if not isinstance(values, list):
        raise RowFault(number, column, show(row), "a list of integers", drop_row())
    flat = np.asarray(values) if values else np.zeros(0, np.int64)
    if flat.ndim != 1 or flat.dtype.kind not in "iub":
        bad = next((value for value in values if isinstance(value, bool) or not isinstance(value, int)), values)
        raise RowFault(number, column, f"the value {show(bad)}", "a list of integers", drop_row())
    return flat.tolist() if flat.dtype.kind == "b" else values


def _check_bits(values: list[int], column: str, number: int) -> list[int]:
    where = next((place for place, value in enumerate(values) if value not in (0, 1)), None)
    if where is not None:
        received, remedy = f"the value {values[where]} at position {where}", "1 where the loss counts, 0 elsewhere"
        raise RowFault(number, column, received, "0 or 1", remedy)
    return values


def _check_lengths(ids: Rows, others: Rows, column: str) -> None:
    for number, (row, other) in enumerate(zip(ids, others, strict=True)):
        if len(row) != len(other):
            received = f"{len(other)} values for {len(row)} input_ids"
            raise RowFault(number, column, received, "one value for each input id", drop_row())
