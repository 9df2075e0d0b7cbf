"""Pairs of a reward model's rows to a batch, and what a user's collator returned, as trl 1.16 lays them out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import DataError
from .batch import IGNORE, Batch, read_numbers
from .custom import convert_batch

ANSWERS = ("chosen", "rejected")
ID_COLUMNS = ("chosen_ids", "rejected_ids")
MARGIN = "margin"


@dataclass(frozen=True, eq=False)
class ScoredBatch(Batch):
    """A :class:`~hf_mlx.data.batch.Batch` of 2P rows, all chosen ones and then all rejected ones.

    Attributes:
        last: (2P,) int32, the position of each row that is scored: its last token that is not the padding token.
        margins: (P,) float32, or None.
    """

    last: np.ndarray = None  # pyright: ignore[reportAssignmentType]
    margins: np.ndarray | None = None

    @property
    def examples(self) -> int:
        """Pairs."""
        return len(self.input_ids) // 2


def collate_scored(
    rows: Sequence[Mapping[str, Any]], *, pad_token_id: int, pad_to_multiple_of: int | None = None
) -> ScoredBatch:
    """Pads as trl 1.16 ``reward_trainer.DataCollatorForPreference`` does.

    Args:
        rows: Dicts with ``chosen_ids``, ``rejected_ids`` and maybe ``margin``, which the first row decides.
        pad_token_id: Fills ``input_ids``.
        pad_to_multiple_of: Rounds the width up.
    """
    ids = [read_numbers(row, number, column) for column in ID_COLUMNS for number, row in enumerate(rows)]
    lengths = np.array([len(row) for row in ids], np.int32)
    width = int(lengths.max(initial=0))
    if pad_to_multiple_of:
        width = -(-width // pad_to_multiple_of) * pad_to_multiple_of
    filled = np.full((len(ids), width), pad_token_id, np.int32)
    for into, sequence in zip(filled, ids, strict=True):
        into[: len(sequence)] = sequence
    margins = np.array([_margin(row) for row in rows], np.float32) if MARGIN in rows[0] else None
    return _batch(filled, lengths, int(lengths.sum()), pad_token_id, margins)


def convert_scored(mapping: Mapping[str, Any], pad_token_id: int) -> ScoredBatch:
    """What a user's collator returned in trl's layout, as a :class:`ScoredBatch`.

    Args:
        mapping: ``input_ids`` and mostly ``attention_mask`` (2P, T), all chosen rows first, and maybe ``margin`` (P,).
        pad_token_id: Tells where a row ends.

    Raises:
        DataError: Columns that are missing, unknown or of other shapes, a mask with holes, or rows that are padded
            with another id than the padding token, in which transformers reads the score.
    """
    ids = None if not isinstance(mapping, Mapping) or "input_ids" not in mapping else _to_numpy(mapping["input_ids"])
    if ids is None or ids.ndim != 2 or len(ids) % 2:
        found = sorted(mapping) if isinstance(mapping, Mapping) else type(mapping).__name__
        raise DataError(
            f"a data_collator that returns {found}" if ids is None else f"a data_collator's input_ids of {ids.shape}",
            "input_ids and attention_mask (2P, T), all chosen rows and then all rejected ones, and maybe margin (P,)",
            "trl.trainer.reward_trainer.DataCollatorForPreference shows the layout",
        )
    given = dict(mapping)
    margins = given.pop(MARGIN, None)
    batch = convert_batch({**given, "labels": np.full(ids.shape, IGNORE)})
    margins = None if margins is None else _to_numpy(margins).astype(np.float32).reshape(-1)
    if margins is not None and len(margins) != len(ids) // 2:
        raise DataError(
            f"a data_collator's margin of {len(margins)} values for {len(ids) // 2} pairs",
            "one for each pair",
            "batch['margin'] = torch.tensor([row['margin'] for row in rows])",
        )
    made = _batch(batch.input_ids, batch.lengths, batch.num_tokens, pad_token_id, margins, has_mask=batch.has_mask)
    if (made.last >= np.maximum(batch.lengths, 1)).any():
        raise DataError(
            f"a data_collator that pads with another id than the padding token, {pad_token_id}",
            "padding by which transformers finds the last token of a row",
            "pad with tokenizer.pad_token_id",
        )
    return made


def last_tokens(input_ids: np.ndarray, pad_token_id: int) -> np.ndarray:
    """The last position of each row (R, T) that does not hold the padding token, (R,) int32; 0 where all do.

    Source: transformers 5.23 ``GenericForSequenceClassification.forward``. A row that ends with the padding token
    itself, as with ``pad_token = eos_token``, is read before it.
    """
    counted = (input_ids != pad_token_id) * np.arange(input_ids.shape[1])
    return counted.argmax(axis=1).astype(np.int32)


def _batch(
    ids: np.ndarray,
    lengths: np.ndarray,
    tokens: int,
    pad_token_id: int,
    margins: np.ndarray | None,
    *,
    has_mask: bool = True,
) -> ScoredBatch:
    labels = np.full(ids.shape, IGNORE, np.int32)
    last = last_tokens(ids, pad_token_id)
    return ScoredBatch(ids, labels, lengths, tokens, has_mask=has_mask, last=last, margins=margins)


def _margin(row: Mapping[str, Any]) -> float:
    value = row.get(MARGIN)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise DataError(
            f"a row with the margin {value!r}",
            "a number in each row, where the first one has a margin",
            "dataset = dataset.remove_columns('margin'), or a margin of 0.0",
        )
    return float(value)


def _to_numpy(value: Any) -> np.ndarray:
    return np.asarray(value.detach().cpu().numpy() if hasattr(value, "detach") else value)
