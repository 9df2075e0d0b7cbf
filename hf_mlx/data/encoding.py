"""Encoding a whole set: cached Arrow maps for sets on disk or in memory, a lazy map for streams."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np

from .batch import IGNORE
from .encode import EncodedRows, RowEncoder
from .kept import RawColumns, keep_columns
from .tokenize import is_standard

#: Raise it when the same rows would encode differently, so that no cache of an older version is reused.
_VERSION = 3
_STREAM_BATCH = 64
#: A stream whose first rows, this many, train nothing is refused like a set that trains nothing.
_STREAM_SEARCH = 10_000
_COUNTS = ("_cut", "_diverged", "_short", "_empty", "_tokens", "_trained")


@dataclass(frozen=True)
class Counts:
    """Sums over an encoded set: rows, those cut, masked, diverged, of one token and of none; tokens, tokens trained."""

    rows: int
    masked: int
    trained: int
    cut: int = 0
    diverged: int = 0
    short: int = 0
    empty: int = 0
    tokens: int = 0


def encode_set(dataset: Any, encoder: RowEncoder, *, keep: bool = False) -> tuple[Any, Counts]:
    """Encodes a Dataset in batches, on ``dataset_num_proc`` processes, with datasets' cache and progress bar.

    Args:
        dataset: In memory or on disk.
        encoder: Of the set.
        keep: The columns that are read stay beside the tokens, as TRL leaves them.

    Returns:
        ``(dataset, counts)``: ``input_ids`` and ``labels`` (int32 lists) beside the columns that were not read.
        Rows without a trained token are left out where TRL leaves them out: not when packing, not unlimited.
    """
    from datasets import Features, List, Value, concatenate_datasets

    lists, number = List(Value("int32")), Value("int32")
    read = dataset.select_columns(list(encoder.format.columns))
    encoded = read.map(
        _TableEncoder(encoder),
        batched=True,
        with_indices=True,
        remove_columns=read.column_names,
        features=Features({"input_ids": lists, "labels": lists, **dict.fromkeys(_COUNTS, number)}),
        num_proc=encoder.plan.dataset_num_proc,
        desc=f"Tokenizing {encoder.name} dataset",
        new_fingerprint=_fingerprint(read, encoder),
    )
    sums = {name: encoded.data.column(name).to_numpy() for name in _COUNTS}
    trains = sums["_trained"] > 0
    counts = Counts(
        rows=len(encoded),
        cut=int(sums["_cut"].sum()),
        masked=int((~trains).sum()),
        diverged=int(sums["_diverged"].sum()),
        short=int(sums["_short"].sum()),
        empty=int(sums["_empty"].sum()),
        tokens=int(sums["_tokens"].sum(dtype=np.int64)),
        trained=int(sums["_trained"].sum(dtype=np.int64)),
    )
    encoded = encoded.remove_columns(list(_COUNTS))
    beside = [name for name in dataset.column_names if name not in (*read.column_names, *encoded.column_names)]
    if beside and not encoder.packing:
        encoded = concatenate_datasets([encoded, dataset.select_columns(beside)], axis=1)
    if keep and not encoder.packing and (raw := keep_columns(dataset, encoder)) is not None:
        made = [name for name in raw.column_names if name in encoded.column_names]
        encoded = concatenate_datasets([encoded.remove_columns(made), raw], axis=1)
    if counts.masked and counts.trained and not encoder.packing and encoder.plan.max_length is not None:
        encoded = encoded.select(np.flatnonzero(trains))
    return encoded, counts


def stream_set(dataset: Any, encoder: RowEncoder, *, keep: bool = False) -> tuple[Any, Counts]:
    """Encodes an IterableDataset lazily, a few rows ahead; the same rows are dropped as in :func:`encode_set`.

    Returns:
        ``(dataset, counts)``; the counts are those of the rows read to find one that trains, usually the first.
    """
    encoded = dataset.map(
        _StreamEncoder(encoder, keep and not encoder.packing),
        batched=True,
        batch_size=_STREAM_BATCH,
        with_indices=True,
        remove_columns=list(encoder.format.columns),
    )
    masked, trained = 0, 0
    for row in islice(iter(encoded), _STREAM_SEARCH):
        if trained := sum(label != IGNORE for label in row["labels"]):
            break
        masked += 1
    counts = Counts(rows=masked + bool(trained), masked=masked, trained=trained)
    if encoder.packing or encoder.plan.max_length is None:
        return encoded, counts
    return encoded.filter(_has_target), counts


def _has_target(row: Mapping[str, Any]) -> bool:
    return any(label != IGNORE for label in row["labels"])


@dataclass(frozen=True)
class _TableEncoder:
    """The encoder as ``Dataset.map`` wants it: an Arrow table out, flat buffers instead of Python lists."""

    encoder: RowEncoder

    def __call__(self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> Any:
        import pyarrow as pa

        rows = self.encoder(batch, indices)
        ids, bounds = _flatten(rows.input_ids)
        same = rows.labels is rows.input_ids
        labels = ids if same else _flatten(rows.labels)[0]
        tokens, trained = self._count(rows, bounds, labels)
        columns = {
            "input_ids": pa.ListArray.from_arrays(bounds, ids),
            "labels": pa.ListArray.from_arrays(bounds, labels),
            "_cut": np.asarray(rows.cut, np.int32),
            "_diverged": np.asarray(rows.diverged, np.int32),
            "_short": (tokens == 1).astype(np.int32),
            "_empty": (tokens == 0).astype(np.int32),
            "_tokens": tokens,
            "_trained": trained,
        }
        return pa.table(columns)

    def _count(self, rows: EncodedRows, bounds: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens that will reach the model, and those that train, in each row."""
        sizes = np.diff(bounds)
        plan = self.encoder.plan
        limit = plan.max_length if self.encoder.packing and plan.packing_strategy == "bfd" else None
        kept = sizes if limit is None else np.minimum(sizes, limit)
        reached = np.concatenate(([0], np.cumsum(labels != IGNORE)))
        return kept, (reached[bounds[:-1] + kept] - reached[bounds[:-1]]).astype(np.int32)


@dataclass(frozen=True)
class _StreamEncoder:
    """The encoder as ``IterableDataset.map`` wants it: a dict of columns out."""

    encoder: RowEncoder
    keep: bool

    def __call__(self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> dict[str, Any]:
        rows = self.encoder(batch, indices)
        raw = RawColumns(self.encoder)(batch, indices) if self.keep else {}
        return {**raw, "input_ids": rows.input_ids, "labels": rows.labels}


def _flatten(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    bounds = np.zeros(len(rows) + 1, np.int32)
    np.cumsum([len(row) for row in rows], out=bounds[1:])
    return np.fromiter(chain.from_iterable(rows), np.int32, count=int(bounds[-1])), bounds


def _fingerprint(dataset: Any, encoder: RowEncoder) -> str:
    """A name for the result that is the same in the next process, so that datasets finds it in its cache.

    Hashing the function itself would not do: a fast tokenizer's state changes when it is first used.
    """
    from datasets.fingerprint import Hasher

    plan = encoder.plan
    settings = (plan.max_length, plan.truncation_mode, plan.packing_strategy if encoder.packing else None)
    masks = (encoder.completion_only, encoder.assistant, encoder.tables)
    parts = (_VERSION, dataset._fingerprint, encoder.format, settings, masks, encoder.formatting_func)
    return Hasher.hash((*parts, describe_tokenizer(encoder.tokenizer)))


def describe_tokenizer(tokenizer: Any) -> Any:
    """What a tokenizer's ids depend on, without the state that changes with its use."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not is_standard(tokenizer):
        return tokenizer
    # What changes with use stands in front of the vocabulary, and parsing that takes seconds for a large one.
    head, mark, rules = backend.to_str().partition('"added_tokens":')
    state = json.loads(head.rstrip(" ,") + "}" if mark else head)
    fixed = sorted((key, json.dumps(value)) for key, value in state.items() if key not in ("truncation", "padding"))
    return type(tokenizer).__name__, fixed, rules, tokenizer.chat_template, tokenizer.special_tokens_map
