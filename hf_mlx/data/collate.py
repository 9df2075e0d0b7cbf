"""Rows to a batch, as trl 1.16 ``DataCollatorForLanguageModeling`` makes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .batch import IGNORE, Batch, bad_row, read_numbers
from .custom import convert_batch

__all__ = ["Batch", "collate", "convert_batch"]

Row = Mapping[str, Any]


def collate(
    rows: Sequence[Row], *, pad_token_id: int, padding_free: bool = False, pad_to_multiple_of: int | None = None
) -> Batch:
    """Pads rows on the right, or lays them out as one row of documents.

    Where rows hold documents (``seq_lengths``, or ``padding_free``), ``segments`` numbers them and the first label of
    each is -100, since nothing precedes it.

    Args:
        rows: Dicts with ``input_ids``, and optionally ``labels`` (the input ids when absent) and ``seq_lengths``.
        pad_token_id: Fills ``input_ids``; labels are filled with -100.
        padding_free: One (1, N) row, documents end to end.
        pad_to_multiple_of: Rounds T up.

    Raises:
        DataError: A row whose columns disagree or hold other than whole numbers, or masks without labels.
    """
    ids, labels, documents = [], [], []
    packed = any(row.get("seq_lengths") is not None for row in rows)
    for number, row in enumerate(rows):
        tokens, targets = _read_row(row, number)
        if packed or padding_free:
            sizes = _read_sizes(row, len(tokens), number)
            targets[np.cumsum(sizes) - sizes] = IGNORE
            documents.append(np.repeat(np.arange(len(sizes)), sizes))
        ids.append(tokens)
        labels.append(targets)
    lengths = np.array([len(row) for row in ids], np.int32)
    if padding_free:
        first = np.cumsum([0] + [int(row[-1]) + 1 for row in documents])
        documents = [np.concatenate([row + start for row, start in zip(documents, first, strict=False)])]
        ids, labels, lengths = [np.concatenate(ids)], [np.concatenate(labels)], lengths.sum(keepdims=True)
    width = int(lengths.max(initial=0))
    if pad_to_multiple_of:
        width = -(-width // pad_to_multiple_of) * pad_to_multiple_of
    segments = None
    if documents:
        padding = max(int(row[-1]) for row in documents) + 1
        segments = _fill(documents, width, padding)
    # Without a mask TRL counts position_ids.size(1), which holds padding too.
    tokens = width if padding_free else int(lengths.sum())
    return Batch(
        _fill(ids, width, pad_token_id),
        _fill(labels, width, IGNORE),
        lengths.astype(np.int32),
        tokens,
        segments,
        has_mask=not padding_free,
    )


def _read_sizes(row: Row, tokens: int, number: int) -> np.ndarray:
    """Lengths of the documents in a row: one, unless it was packed."""
    sizes = np.array([tokens] if row.get("seq_lengths") is None else row["seq_lengths"], np.int64)
    if sizes.sum() != tokens or not (sizes > 0).all():
        received = f"{sizes.tolist()}, a sum of {sizes.sum()}"
        raise bad_row(number, "seq_lengths", received, f"lengths above 0 whose sum is {tokens}, the input_ids")
    return sizes


def _read_row(row: Row, number: int) -> tuple[np.ndarray, np.ndarray]:
    if row.get("input_ids") is None:
        raise bad_row(number, "input_ids", f"missing; the row has {sorted(row)}", "token ids, or a data_collator")
    tokens = read_numbers(row, number, "input_ids")
    if row.get("labels") is not None:
        targets = read_numbers(row, number, "labels")
        if targets.shape != tokens.shape:
            raise bad_row(number, "labels", f"{targets.size} labels", f"{tokens.size}, one for each input id")
        return tokens, targets
    masks = [name for name in ("completion_mask", "assistant_masks") if name in row]
    if masks:
        raise bad_row(number, masks[0], "a mask but no labels", "labels, since masks are applied in preparation")
    return tokens, tokens.copy()


def _fill(rows: Sequence[np.ndarray], width: int, value: int) -> np.ndarray:
    out = np.full((len(rows), width), value, np.int32)
    for number, row in enumerate(rows):
        out[number, : len(row)] = row
    return out
