"""Datasets that nobody prepares: rows go to the collator as they are, in any kind of dataset torch can load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import DataError
from .prepare import Prepared
from .report import Report


def take_rows(dataset: Any, name: str) -> Prepared:
    """A set as its owner made it.

    Args:
        dataset: What ``transformers.Trainer`` takes: a Dataset of ``datasets`` in any format, a torch ``Dataset``, a
            list, or a stream of either; None for no rows.
        name: What messages call it.

    Raises:
        DataError: Neither indexed nor iterated over.
    """
    indexed = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    if isinstance(dataset, Mapping) or not (dataset is None or indexed or hasattr(dataset, "__iter__")):
        what = f"a {type(dataset).__name__}" + (f" of {list(dataset)}" if isinstance(dataset, Mapping) else "")
        raise DataError(
            f"the {name} dataset is {what}",
            "one datasets.Dataset, torch.utils.data.Dataset, list of rows or stream",
            f"{name}_dataset=dataset['train']"
            if isinstance(dataset, Mapping)
            else "an object with __getitem__ and __len__, or with __iter__",
        )
    return Prepared(dataset, Report(name, rows=len(dataset) if dataset is not None and indexed else None), False, False)


def view_columns(dataset: Any, columns: Sequence[str]) -> Any:
    """``dataset`` without the columns that the model's forward does not take.

    Source: transformers 5.23 ``Trainer._remove_unused_columns``; other kinds of datasets lose them row by row.

    Raises:
        DataError: None is left.
    """
    import datasets

    if not isinstance(dataset, datasets.Dataset):
        return dataset
    unused = [column for column in dataset.column_names if column not in columns]
    if len(unused) == len(dataset.column_names):
        raise DataError(
            "No columns in the dataset match the model's forward method signature: "
            f"({', '.join(columns)}). The following columns have been ignored: [{', '.join(unused)}]. Please check "
            "the dataset and model.",
            "rows with input_ids (this trainer tokenizes nothing, as transformers.Trainer)",
            "dataset = dataset.map(lambda row: tokenizer(row['text'])), or "
            "TrainingArguments(remove_unused_columns=False) with a data_collator of your own",
        )
    return dataset.remove_columns(unused) if unused else dataset


def row_lengths(dataset: Any, column: str, key: str) -> list[int]:
    """Tokens of every row, for batches of rows of like length.

    Source: transformers 5.23 ``Trainer._get_train_sampler`` and ``trainer_pt_utils.LengthGroupedSampler``.

    Args:
        dataset: Indexed.
        column: Where the lengths are read, if the dataset has it.
        key: Whose length counts otherwise.

    Raises:
        DataError: Rows without ``key``.
    """
    if column in (getattr(dataset, "column_names", None) or ()):
        return list(dataset[column])
    try:
        return [len(dataset[number][key]) for number in range(len(dataset))]
    except (KeyError, TypeError, IndexError) as error:
        raise DataError(
            f"train_sampling_strategy='group_by_length' with rows without {key!r}",
            f"rows with {key!r}, or a column {column!r} of their lengths",
            "TrainingArguments(train_sampling_strategy='random')",
        ) from error
