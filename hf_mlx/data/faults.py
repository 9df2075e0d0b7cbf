"""How a bad row is reported: found deep in the pipeline, named where the row number is known."""

from __future__ import annotations

from ..errors import DataError

#: Longest text one row may hold, in characters. A longer one is a file read into a single row; tokenizing it takes
#: gigabytes and it would be cut to ``max_length`` anyway.
MAX_CHARACTERS = 5_000_000


class RowFault(Exception):
    """A row that cannot be trained on; ``row`` counts from the start of the batch at hand.

    Never leaves this package: :func:`name_row` turns it into the :class:`~hf_mlx.errors.DataError` users see.
    """

    def __init__(self, row: int, column: str, received: str, required: str, remedy: str) -> None:
        super().__init__(received)
        self.row, self.column = row, column
        self.received, self.required, self.remedy = received, required, remedy

    def __reduce__(self):
        return type(self), (self.row, self.column, self.received, self.required, self.remedy)


def name_row(fault: RowFault, dataset: str, index: int) -> DataError:
    """The error for ``fault``, at row ``index`` of the set called ``dataset``."""
    return DataError(
        f"row {index} of the {dataset} dataset, column {fault.column!r}: {fault.received}",
        fault.required,
        fault.remedy,
    )


def drop_row(dataset_words: str = "dataset") -> str:
    """The remedy shared by rows that only the user can repair."""
    return f"repair the row, or leave it out: {dataset_words} = {dataset_words}.select(i for i in good_rows)"


def show(value: object, limit: int = 80) -> str:
    """``value`` for an error message: its type, and its text where that is short enough to help."""
    text = repr(value) if not isinstance(value, str) or len(value) <= limit else repr(value[:limit]) + "…"
    return f"{text[:limit]} ({type(value).__name__})"
