"""Raw columns beside the tokens, for a collator of the user's that asks for them (``remove_unused_columns=False``).

trl 1.16 ``SFTTrainer._prepare_dataset`` leaves them in the set as it has changed them on the way: texts and completions
end with EOS, from/value turns are messages, a formatter's text stands in ``"text"``, and masks are labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .encode import RowEncoder
from .faults import RowFault, name_row
from .messages import convert_turns


@dataclass(frozen=True)
class RawColumns:
    """The columns that preparation reads, as upstream leaves them. Made for ``Dataset.map``."""

    encoder: RowEncoder

    def __call__(self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> dict[str, Any]:
        """The columns of rows numbered ``indices``; others are left out.

        Raises:
            DataError: A row that cannot be read, by index and column.
        """
        encoder = self.encoder
        columns = {name: list(batch[name]) for name in encoder.format.columns}
        try:
            return self._change(columns, len(indices))
        except RowFault as fault:
            raise name_row(fault, encoder.name, indices[fault.row]) from fault.__cause__

    def _change(self, columns: dict[str, list[Any]], count: int) -> dict[str, Any]:
        encoder, kind = self.encoder, self.encoder.format.kind
        if kind == "tokenized":
            unused = "completion_mask" in columns and not encoder.completion_only and "labels" not in columns
            return {"completion_mask": columns["completion_mask"]} if unused else {}
        if kind == "formatted":
            rows = [{name: columns[name][row] for name in columns} for row in range(count)]
            columns["text"] = [encoder.format_row(row, number) for number, row in enumerate(rows)]
        closed = {"text": encoder.format.columns[0], "formatted": "text", "prompt_completion": "completion"}.get(kind)
        if closed is not None and not encoder.format.conversational:
            columns[closed] = [encoder.close(text, closed, row) for row, text in enumerate(columns[closed])]
        if "conversations" in columns and encoder.format.conversational:
            turns = columns.pop("conversations")
            columns["messages"] = [convert_turns(value, row) for row, value in enumerate(turns)]
        return columns


def keep_columns(dataset: Any, encoder: RowEncoder) -> Any:
    """The raw columns of a Dataset, row for row; None where none is left."""
    read = dataset.select_columns(list(encoder.format.columns))
    kept = read.map(
        RawColumns(encoder),
        batched=True,
        with_indices=True,
        remove_columns=read.column_names,
        desc=f"Keeping the columns of the {encoder.name} dataset",
    )
    return kept if kept.column_names else None
