"""The batch every layer above works on: plain numpy, right-padded, labels already masked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import DataError

IGNORE = -100


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of token ids, ready for a step.

    Attributes:
        input_ids: (B, T) int32.
        labels: (B, T) int32, -100 where the loss does not count. Not shifted: ``labels[:, 1:]`` are the targets.
        lengths: (B,) int32, tokens of each row before padding.
        num_tokens: What TRL logs as ``num_tokens``: the sum of the attention mask, or T for a padding-free row.
        segments: (B, T) int32 document number of each token, where documents must not see each other; else None.
        has_mask: Whether upstream's batch has an attention mask.
        keys: (B, T) bool, False for positions that none may see; None where padding on the right is all there is to it.
        collated: What the collator returned, where a loss or metrics of the script's own may read it.
        has_labels: False for rows that are only predicted from; ``labels`` are then -100.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray
    num_tokens: int
    segments: np.ndarray | None = None
    has_mask: bool = True
    keys: np.ndarray | None = None
    collated: Mapping[str, Any] | None = None
    has_labels: bool = True

    @property
    def collated_ids(self) -> np.ndarray:
        """``input_ids`` with the rows in upstream's order."""
        return self.input_ids

    @property
    def examples(self) -> int:
        """Rows of the dataset that it was made of."""
        return len(self.input_ids)

    @property
    def num_items(self) -> int:
        """Targets that count, which is what HF divides the summed loss by."""
        return int((self.labels[:, 1:] != IGNORE).sum())

    def count_input_tokens(self, pad_token_id: int | None) -> int:
        """Tokens that are no padding, as transformers 5.23 ``Trainer._track_num_input_tokens`` counts them.

        Without a mask it goes by the padding token, wherever that stands.
        """
        if self.has_mask or pad_token_id is None:
            return self.num_tokens
        return int((self.input_ids != pad_token_id).sum())

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)."""
        rows, columns = self.input_ids.shape
        return rows, columns


def read_numbers(row: Mapping[str, Any], number: int, column: str) -> np.ndarray:
    """The ids or labels in a column of a row of a batch, (T,) int32.

    Raises:
        DataError: They are no whole numbers.
    """
    values = np.asarray(row[column])
    # An empty list is one of floats to numpy.
    numbers = values.astype(np.int32) if values.dtype.kind in "iub" or not values.size else None
    if numbers is None or (numbers != values).any():
        raise bad_row(number, column, f"{values.ravel()[:3].tolist()} …", "whole numbers: token ids, or -100 in labels")
    return numbers


def bad_row(number: int, column: str, received: str, required: str) -> DataError:
    """What a row of a batch is refused with."""
    return DataError(
        f"row {number} of a batch, column {column!r}: {received}",
        required,
        "let the trainer prepare the dataset (no skip_prepare_dataset), or repair the column",
    )
