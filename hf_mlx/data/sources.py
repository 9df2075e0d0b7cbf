"""What may be handed over as a dataset, and its first row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import DataError
from .faults import drop_row, show

_OPTIONAL = ("tools", "chat_template_kwargs")
_TOKEN_COLUMNS = {"input_ids", "labels", "completion_mask", "assistant_masks"}


def read_source(dataset: Any, name: str, *, as_is: bool = False) -> Any:
    """A Dataset or IterableDataset with plain Python rows, from either of them or from a list of dicts.

    Args:
        dataset: What the user handed over.
        name: What messages call it.
        as_is: Rows are ready to train on, so a dataset that makes them on the fly will do.

    Raises:
        DataError: Something else, a dataset that transforms rows on the fly, or rows that do not share columns.
    """
    from datasets import Dataset, IterableDataset

    if isinstance(dataset, IterableDataset):
        return dataset
    if isinstance(dataset, Dataset) and as_is:
        return dataset
    if isinstance(dataset, Dataset):
        if dataset.format["type"] == "custom":
            raise DataError(
                f"the {name} dataset has a transform (Dataset.with_transform)",
                "rows that stay the same when read again; TRL refuses this too",
                "apply it once: dataset = dataset.map(your_function), or "
                "SFTConfig(dataset_kwargs={'skip_prepare_dataset': True}) if it returns tokens",
            )
        return dataset.with_format(None)
    if isinstance(dataset, Mapping):
        splits = list(dataset)
        raise DataError(
            f"the {name} dataset is a {type(dataset).__name__} of {splits}",
            "one Dataset, IterableDataset or list of dicts",
            f"pass one split: {name}_dataset=dataset[{splits[0] if splits else 'train'!r}]",
        )
    if isinstance(dataset, Sequence) and not isinstance(dataset, str):
        return _read_list(list(dataset), name)
    raise DataError(
        f"the {name} dataset is a {type(dataset).__name__}",
        "a datasets.Dataset, a datasets.IterableDataset or a list of dicts",
        "from datasets import Dataset; dataset = Dataset.from_list(rows)",
    )


def read_first(dataset: Any, name: str) -> tuple[dict[str, Any], list[str]]:
    """The first row, and all column names.

    Raises:
        DataError: The dataset is empty.
    """
    first = next(iter(dataset), None)
    if first is None:
        raise DataError(
            f"the {name} dataset is empty: it has no row 0, columns {dataset.column_names}",
            "at least one row",
            f"check what loaded it: print(len({name}_dataset))",
        )
    return first, list(dataset.column_names or first)


def _read_list(rows: list[Any], name: str) -> Any:
    from datasets import Dataset

    columns = _match_rows(rows, name)
    for column in sorted(_TOKEN_COLUMNS & set(columns)):
        for index, row in enumerate(rows):
            _check_whole(row[column], name, index, column)
    try:
        return Dataset.from_dict({column: [row.get(column) for row in rows] for column in columns})
    except Exception as cause:
        raise _locate(rows, columns, name, cause) from cause


def _match_rows(rows: list[Any], name: str) -> list[str]:
    """The columns all rows share; those a conversation may lack are filled with None."""
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise _bad_value(name, index, "(the whole row)", show(row), "a dict of columns")
    columns = list(rows[0]) if rows else []
    optional = [column for column in _OPTIONAL if any(column in row for row in rows)]
    for index, row in enumerate(rows):
        for column in [*columns, *row]:
            if column not in optional and (column not in row or column not in columns):
                received = "missing here" if column not in row else "missing in row 0"
                raise _bad_value(name, index, column, received, f"the columns of row 0, {columns}, in each row")
    return list(dict.fromkeys([*columns, *optional]))


def _check_whole(value: Any, name: str, index: int, column: str) -> None:
    # One fraction would turn the whole column into fractions, and the error would name the wrong row.
    numbers = value if isinstance(value, (list, tuple)) else []
    fraction = next((number for number in numbers if isinstance(number, float)), None)
    if fraction is not None:
        raise _bad_value(name, index, column, f"the value {show(fraction)}", "a list of integers")


def _locate(rows: list[Any], columns: list[str], name: str, cause: Exception) -> DataError:
    """Names the first value that Arrow cannot store beside those before it."""
    import pyarrow as pa

    for column in columns:
        sample: list[Any] = []
        for index, row in enumerate(rows):
            value = row.get(column)
            try:
                kind = pa.array([*sample, value]).type
            except Exception as error:
                received = f"{show(value)}, which does not fit the rows before it: {error}"
                return _bad_value(name, index, column, received, "values of one type in a column")
            if value is not None and not pa.types.is_null(kind):
                sample = [value]
    return _bad_value(
        name, 0, columns[0], f"rows that datasets cannot store: {cause}", "values of one type in a column"
    )


def _bad_value(name: str, index: int, column: str, received: str, required: str) -> DataError:
    return DataError(f"row {index} of the {name} dataset, column {column!r}: {received}", required, drop_row())
