"""Rows to a micro-batch: by the user's own collator, or as the recipe collates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..data.batch import Batch
from ..data.custom import MODEL_INPUTS
from ..data.guard import Guard
from ..data.masked import check_labels
from .recipe import RowTable


class Collation:
    """How the rows of a run become batches.

    Args:
        rows: The recipe's.
        guard: Looks at each batch.
        tokenizer: Prepared.
        plan: The data settings.
        columns: Those of a row that a user's collator gets.
        keep_columns: It gets all of them.

    Attributes:
        collator: The user's ``data_collator``, or None.
        keeps_batches: Batches keep all that the collator returned, for a loss of the script's own.
    """

    keeps_batches = False

    def __init__(
        self,
        rows: RowTable,
        guard: Guard,
        tokenizer: Any,
        plan: Any,
        *,
        collator: Callable | None,
        columns: Sequence[str],
        keep_columns: bool,
    ) -> None:
        self._rows, self._guard, self._tokenizer, self._plan = rows, guard, tokenizer, plan
        self.collator = collator
        self._columns, self._keep_columns = columns, keep_columns

    def __call__(self, rows: list[dict[str, Any]], *, padding_free: bool) -> Batch:
        """Prepared rows as a micro-batch."""
        if self.collator is not None:
            if not self._keep_columns:
                rows = [self._select(row) for row in rows]
            return self.convert(self.collator(rows))
        return self._checked(self._rows.collate(rows, self._tokenizer, self._plan, padding_free=padding_free))

    def convert(self, collated: Mapping[str, Any]) -> Batch:
        """What a user's collator or loader returned, as a batch."""
        if not self.keeps_batches or not isinstance(collated, Mapping):
            return self._checked(self._rows.convert(collated, self._guard.fill_id))
        # Columns that the model does not take are for the script's loss.
        known = {name: value for name, value in collated.items() if name in MODEL_INPUTS}
        batch = self._guard.batch(self._rows.convert(known, self._guard.fill_id))
        return replace(batch, collated={name: value for name, value in collated.items() if value is not None})

    def _checked(self, batch: Batch) -> Batch:
        if not self._rows.odd_labels and not self.keeps_batches:
            check_labels(batch)
        return self._guard.batch(batch)

    def _select(self, row: Any) -> Any:
        # Upstream leaves rows of other kinds as they are.
        return {key: row[key] for key in self._columns if key in row} if isinstance(row, dict) else row
