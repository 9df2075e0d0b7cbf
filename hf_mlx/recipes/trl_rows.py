"""What the rows of all trl's trainers have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..data.order import count_tokens
from ..data.prepare import prepare_tokenizer


class TrlRows:
    """Rows that are prepared with the model's tokenizer, so that they hold what is trained on and little else."""

    reads_tokenizer = True

    def prepare_tokenizer(self, tokenizer: Any, plan: Any) -> Any:
        return prepare_tokenizer(tokenizer, plan)

    def view(self, dataset: Any, columns: Sequence[str]) -> Any:
        return dataset

    def lengths(self, dataset: Any, column: str, tokenizer: Any, *, keep_columns: bool) -> list[int]:
        # transformers looks for the column once it has removed those that the model does not take.
        if keep_columns and column in dataset.column_names:
            return list(dataset[column])
        return count_tokens(dataset)
