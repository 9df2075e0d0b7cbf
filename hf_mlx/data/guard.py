"""One guard over every way in: rows while they are prepared, sets that come prepared, and each micro-batch."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from ..errors import DataError
from ..settings.plan import DataPlan
from .batch import Batch
from .masked import has_blind_targets
from .order import count_tokens
from .tables import Check, Tables, check_batch, check_columns, check_filled, check_padding, has_odd_labels

logger = logging.getLogger(__name__)


class Guard:
    """Keeps ids, labels and positions inside the model's tables.

    Args:
        tables: The model's; without a count of ids, the tokenizer's size is taken.
        tokenizer: Prepared; None where there is none.
        plan: The data settings.
        collated: The user's own collator makes the batches, so rows say nothing about what they will hold.

    Attributes:
        rows: What rows are checked against while they are prepared.
        refuses_blind: Labels that are predicted from a position that sees no key are refused.
        fill_id: An id that is in the table, for positions that nobody sees: the padding token where it is one.
    """

    def __init__(self, tables: Tables | None, tokenizer: Any, plan: DataPlan, *, collated: bool) -> None:
        tables = tables or Tables()
        self._check = Check(
            replace(tables, ids=tables.ids or (None if tokenizer is None else len(tokenizer))), tokenizer
        )
        self._plan = plan
        self._collated = collated
        self._told = False
        self.refuses_blind = False
        self.rows = Tables() if collated else self._check.tables
        pad = getattr(tokenizer, "pad_token_id", None)
        self.fill_id: int = pad if pad is not None and 0 <= pad <= self._check.tables.largest_id else 0

    def dataset(self, dataset: Any, name: str, batch_size: int, *, padding_free: bool, as_is: bool = False) -> None:
        """Checks a prepared set before anything is trained, as far as its rows are known.

        Args:
            dataset: Of :func:`~hf_mlx.data.prepare.prepare`.
            name: What errors call it.
            batch_size: Rows of its micro-batches.
            padding_free: They are joined rather than padded.
            as_is: Nothing was prepared, whatever the settings say.

        Raises:
            DataError: Names the row.
        """
        if self._collated or not hasattr(dataset, "__len__") or dataset.format["type"] == "custom":
            return
        if as_is or self._plan.skip_prepare_dataset:
            check_columns(dataset, self._check, name)
        padded = self._check.tokenizer.pad_token_id != self.fill_id
        if padding_free or "input_ids" not in dataset.column_names or not (padded or batch_size == 1):
            return
        lengths = count_tokens(dataset)
        if batch_size == 1:
            check_filled(lengths, name)
        if padded:
            check_padding(lengths, batch_size, self._plan.pad_to_multiple_of, self._check, name)

    def adopt_collator(self) -> None:
        """From now on the user's own collator makes the batches."""
        self._collated = True

    def batch(self, batch: Batch) -> Batch:
        """``batch`` as it is, once it is known to stay inside the tables.

        Raises:
            DataError: Names the row and the position.
        """
        if self.refuses_blind and has_blind_targets(batch):
            raise DataError(
                "a batch with labels on the first token after padding on the left, and attn_implementation='eager'",
                "attention of zero where a query sees no key, which sdpa has and eager has not",
                "AutoModelForCausalLM.from_pretrained(…, attn_implementation='sdpa')",
            )
        check_batch(batch, self._check, "a batch of the data_collator" if self._collated else "a batch")
        if not self._told and has_odd_labels(batch):
            self._told = True
            logger.warning(
                "labels below 0 other than -100 train the token 0, as under TRL; only -100 is left out of the loss: "
                "labels = [-100 if label < 0 else label for label in labels]"
            )
        return batch
