"""Ids and positions that a model has a row for. MLX reads whatever lies behind a table, so nothing beyond may pass.

torch raises an IndexError in the middle of a run. Here rows are checked while they are prepared, and every micro-batch
on the host before it is computed: that reaches what a stream, a transform or a collator makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import DataError
from .batch import IGNORE, Batch
from .faults import RowFault

_INT32 = np.iinfo(np.int32)


@dataclass(frozen=True)
class Tables:
    """How many rows the tables of a model have; None is unknown, or without limit.

    Attributes:
        ids: Of the embedding, and of the logits.
        positions: Of learned position embeddings, or tokens of a row from which on the numbers would be others.
        why: What a longer row would meet, for messages.
    """

    ids: int | None = None
    positions: int | None = None
    why: str = ""

    @property
    def largest_id(self) -> int:
        """The largest id that may pass."""
        return _INT32.max if self.ids is None else self.ids - 1


def check_row(ids: Sequence[int], labels: Sequence[int], row: int, columns: tuple[str, str], check: Check) -> None:
    """Checks one row of a dataset, as it will be trained on.

    Args:
        ids, labels: Of equal lengths; labels may be -100.
        row: Its number in the batch at hand.
        columns: Where an error about ids, and about labels, is looked for.
        check: What it is checked against.

    Raises:
        RowFault: An id or a label without a row in the table, or more tokens than there are positions.
    """
    limit = check.tables.largest_id
    if ids and (max(ids) > limit or min(ids) < 0):
        at = next(place for place, value in enumerate(ids) if not 0 <= value <= limit)
        raise RowFault(row, columns[0], *check.describe_id(ids[at], at))
    if labels is not ids and labels and (max(labels) > limit or min(labels) < _INT32.min):
        at = next(place for place, value in enumerate(labels) if not _INT32.min <= value <= limit)
        raise RowFault(row, columns[1], *check.describe_label(labels[at], at))
    positions = check.tables.positions
    if positions is not None and len(ids) > positions:
        raise RowFault(row, columns[0], *check.describe_length(len(ids)))


@dataclass(frozen=True)
class Check:
    """Tables, and the tokenizer that helps to say what is wrong with an id."""

    tables: Tables
    tokenizer: Any

    def describe_id(self, value: int, at: int) -> tuple[str, str, str]:
        """Received, required and remedy for the id ``value`` at position ``at``."""
        tables, tokenizer = self.tables, self.tokenizer
        required = f"ids from 0 to {tables.largest_id}: the model embeds {tables.largest_id + 1:,}"
        known = len(tokenizer) if tokenizer is not None else 0
        if tokenizer is None or not 0 <= value < known:
            return f"the value {value} at position {at}", required, _RETOKENIZE
        token = tokenizer.convert_ids_to_tokens(int(value))
        name = "the padding token" if value == tokenizer.pad_token_id else "the token"
        return (
            f"{name} {token!r}, the value {value} at position {at}; the tokenizer has {known:,} tokens",
            required,
            _RESIZE,
        )

    def describe_label(self, value: int, at: int) -> tuple[str, str, str]:
        """The same for the label ``value``."""
        required = f"-100, or an id from 0 to {self.tables.largest_id}"
        known = len(self.tokenizer) if self.tokenizer is not None else 0
        return f"the value {value} at position {at}", required, _RESIZE if 0 <= value < known else _RETOKENIZE

    def describe_length(self, length: int) -> tuple[str, str, str]:
        """The same for a row of ``length`` tokens."""
        positions = self.tables.positions
        return (
            f"{length:,} tokens",
            f"at most {positions:,}: {self.tables.why}",
            f"SFTConfig(max_length={positions})",
        )


_NO_TOKEN = (
    "at least one token in a micro-batch (TRL raises too)",
    "SFTConfig(max_length=1024), which drops empty rows, or dataset = dataset.filter(lambda row: row['input_ids'])",
)
_RETOKENIZE = "tokenize with the tokenizer of the model that is trained"
_RESIZE = (
    "model = AutoModelForCausalLM.from_pretrained(name); model.resize_token_embeddings(len(tokenizer)); "
    "MLXSFTTrainer(model=model, ...), or the model's own tokenizer, without added tokens"
)


def check_batch(batch: Batch, check: Check, source: str) -> None:
    """Checks a micro-batch on the host.

    Args:
        batch: As it was collated.
        check: What it is checked against.
        source: Where it came from, for errors.

    Raises:
        DataError: As :func:`check_row`, with the row and the position in the micro-batch.
    """
    limit, positions = check.tables.largest_id, check.tables.positions
    ids, labels = batch.input_ids, batch.labels
    if not ids.size:
        raise DataError(f"the {len(ids)} rows of {source} without a token", *_NO_TOKEN)
    if ids.max() > limit or ids.min() < 0:
        row, at = _first((ids < 0) | (ids > limit))
        raise _refuse(source, row, "input_ids", check.describe_id(int(ids[row, at]), at))
    if labels.size and labels.max() > limit:
        row, at = _first(labels > limit)
        raise _refuse(source, row, "labels", check.describe_label(int(labels[row, at]), at))
    if positions is not None and ids.shape[1] > positions:
        raise _refuse(source, int(batch.lengths.argmax()), "input_ids", check.describe_length(ids.shape[1]))


def check_columns(dataset: Any, check: Check, name: str) -> None:
    """Checks the rows of a Dataset that was prepared by its owner.

    Args:
        dataset: In memory or on disk; columns that are no lists of integers are left to the collator.
        check: What its ``input_ids`` and ``labels`` are checked against.
        name: What errors call the set.

    Raises:
        DataError: As :func:`check_row`, with the row of the dataset.
    """
    import pyarrow as pa

    columns = [name for name in ("input_ids", "labels") if name in dataset.column_names]
    if "input_ids" not in columns:
        return
    first = 0
    for table in dataset.select_columns(columns).with_format("arrow").iter(batch_size=1000):
        kinds = [table.schema.field(column).type for column in columns]
        lists = all(pa.types.is_list(kind) or pa.types.is_large_list(kind) for kind in kinds)
        if not lists or not all(pa.types.is_integer(kind.value_type) for kind in kinds):
            return
        if _may_be_outside(table, columns, check.tables):
            _check_table(table, columns, check, name, first)
        first += table.num_rows


def check_padding(lengths: Sequence[int], batch_size: int, multiple: int | None, check: Check, name: str) -> None:
    """Checks the padding token where some micro-batch of rows of these ``lengths`` is padded.

    Raises:
        DataError: It is needed, and the model has no row for it.
    """
    pad = check.tokenizer.pad_token_id
    padded = len(lengths) and (
        (batch_size > 1 and min(lengths) != max(lengths)) or (multiple and any(size % multiple for size in lengths))
    )
    if pad is None or not padded or 0 <= pad <= check.tables.largest_id:
        return
    token, tables = check.tokenizer.pad_token, check.tables
    raise DataError(
        f"pad_token {token!r} is id {pad}, and batches of the {name} dataset are padded with it",
        f"ids from 0 to {tables.largest_id}: the model embeds {tables.largest_id + 1:,}",
        f"tokenizer.pad_token = tokenizer.eos_token, or {_RESIZE}",
    )


def check_filled(lengths: Sequence[int], name: str) -> None:
    """Checks that no micro-batch of one row is without a token.

    Raises:
        DataError: Names the row.
    """
    if 0 in lengths:
        raise DataError(f"row {lengths.index(0)} of the {name} dataset: no token", *_NO_TOKEN)


def has_odd_labels(batch: Batch) -> bool:
    """Whether labels below 0 other than -100 are in ``batch``: upstream takes each for the token 0."""
    labels = batch.labels
    return bool(labels.size) and bool(((labels < 0) & (labels != IGNORE)).any())


def _may_be_outside(table: Any, columns: Sequence[str], tables: Tables) -> bool:
    import pyarrow.compute as pc

    sizes: Any = pc.call_function("list_value_length", [table["input_ids"]])
    longest = pc.call_function("max", [sizes]).as_py() or 0
    if tables.positions is not None and longest > tables.positions:
        return True
    for column in columns:
        found = pc.call_function("min_max", [pc.call_function("list_flatten", [table[column]])]).as_py()
        lowest, highest = found["min"], found["max"]
        if lowest is not None and (highest > tables.largest_id or (lowest < 0 and column == "input_ids")):
            return True
    return False


def _check_table(table: Any, columns: Sequence[str], check: Check, name: str, first: int) -> None:
    from .faults import name_row

    rows = [table[column].to_pylist() for column in columns]
    for number, values in enumerate(zip(*rows, strict=True)):
        ids = values[0] or []
        labels = values[1] if len(values) > 1 and values[1] else ids
        try:
            check_row(ids, labels, number, ("input_ids", "labels"), check)
        except RowFault as fault:
            raise name_row(fault, name, first + number) from None


def _first(wrong: np.ndarray) -> tuple[int, int]:
    row, at = np.argwhere(wrong)[0].tolist()
    return row, at


def _refuse(source: str, row: int, column: str, found: tuple[str, str, str]) -> DataError:
    received, required, remedy = found
    return DataError(f"row {row} of {source}, column {column!r}: {received}", required, remedy)
