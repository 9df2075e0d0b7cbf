"""What a collator of ``transformers.Trainer`` returned, as a batch: any mask, and labels anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import DataError
from .batch import IGNORE, Batch
from .custom import DERIVED, read_array, read_positions

_READ = {"input_ids", "labels", "attention_mask", "position_ids"}


def convert_masked(mapping: Mapping[str, Any]) -> Batch:
    """Reads the tensors that a causal model's forward would get.

    Args:
        mapping: ``input_ids`` and, to learn from, ``labels`` (B, T), optionally ``attention_mask`` (B, T), 0 for keys
            that no position sees, and ``position_ids`` (B, T) that count up from 0, or restart there where a document
            starts.

    Raises:
        DataError: Keys that are missing, unknown or of other shapes, or positions that the model here does not take.
    """
    if not isinstance(mapping, Mapping) and hasattr(mapping, "keys"):
        mapping = {key: mapping[key] for key in mapping.keys()}  # noqa: SIM118 - a BatchEncoding
    if not isinstance(mapping, Mapping):
        raise _refuse(f"a {type(mapping).__name__}", "a dict of arrays", "return {'input_ids': …, 'labels': …}")
    given = {key: value for key, value in mapping.items() if value is not None}
    if unknown := sorted(set(given) - _READ - DERIVED):
        names = ", ".join(unknown)
        raise _refuse(f"the keys {unknown}", f"only {sorted(_READ)}", f"leave out {names}: batch.pop({unknown[0]!r})")
    if "input_ids" not in given:
        raise _refuse(f"no 'input_ids' (keys {sorted(given)})", "input_ids and labels", "batch['input_ids'] = …")
    arrays = {key: _read(given[key], key) for key in sorted(_READ & set(given))}
    ids = arrays["input_ids"]
    labels = arrays.get("labels", np.full(ids.shape, IGNORE, np.int32))
    for key, array in arrays.items():
        if array.shape != ids.shape or ids.ndim != 2:
            raise _refuse(f"{key} of shape {array.shape}, input_ids of {ids.shape}", "(B, T) each", "pad to one length")
    mask = arrays.get("attention_mask")
    keys = None if mask is None or mask.all() else mask != 0
    whole = np.full(len(ids), ids.shape[1], np.int32)
    segments = _read_documents(arrays.get("position_ids"), labels, mask, whole)
    lengths = whole if keys is None else _lengths(keys)
    tokens = ids.size if mask is None else int(mask.sum())
    return Batch(
        ids, labels, lengths, tokens, segments, mask is not None, keys, collated=given, has_labels="labels" in given
    )


def _read(value: Any, key: str) -> np.ndarray:
    # A mask may be of any dtype: transformers casts it to bool.
    return read_array(value != 0 if key == "attention_mask" and hasattr(value, "dtype") else value, key)


def check_labelled(batch: Batch) -> Batch:
    """``batch`` as it is, where it can be trained on.

    Raises:
        DataError: With transformers' text.
    """
    if not batch.has_labels:
        raise DataError(
            "The model did not return a loss from the inputs, only the following keys: logits. For reference, the "
            f"inputs it received are {','.join(batch.collated or ())}.",
            "labels in each batch",
            "data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False), or batch['labels'] = …",
        )
    return batch


def check_labels(batch: Batch) -> None:
    """Refuse labels that torch's cross entropy has no class for.

    Raises:
        DataError: Names the label.
    """
    odd = batch.labels[(batch.labels < 0) & (batch.labels != IGNORE)]
    if odd.size:
        raise DataError(
            f"Target {int(odd[0])} is out of bounds.",
            "token ids as labels, and -100 where nothing is scored",
            "labels = [-100 if label < 0 else label for label in labels]",
        )


def needs_keys(batch: Batch) -> bool:
    """Whether plain causal attention over each row's first ``lengths`` tokens would score something else."""
    if batch.keys is None:
        return False
    places = np.arange(batch.input_ids.shape[1])
    if (batch.keys != (places < batch.lengths[:, None])).any():
        return True
    # The first label past a row's end is still predicted from a real token.
    return bool(((places > batch.lengths[:, None]) & (batch.labels != IGNORE)).any())


def has_blind_targets(batch: Batch) -> bool:
    """Whether a label is predicted from a position that sees no key: before the first one of its row."""
    if batch.keys is None:
        return False
    blind = ~np.logical_or.accumulate(batch.keys, axis=1)[:, :-1]
    return bool((blind & (batch.labels[:, 1:] != IGNORE)).any())


def _lengths(keys: np.ndarray) -> np.ndarray:
    """Tokens of each row where it is ones, then zeros; else its whole width."""
    lengths = keys.sum(axis=1).astype(np.int32)
    regular = (keys == (np.arange(keys.shape[1]) < lengths[:, None])).all(axis=1)
    return np.where(regular, lengths, keys.shape[1]).astype(np.int32)


def _read_documents(
    positions: np.ndarray | None, labels: np.ndarray, mask: np.ndarray | None, lengths: np.ndarray
) -> np.ndarray | None:
    if positions is None or (positions == np.arange(positions.shape[1])).all():
        return None
    if mask is not None:
        raise _refuse(
            "position_ids other than 0, 1, 2, … beside an attention_mask",
            "positions that count from 0 to the row's width, which is what they are without position_ids",
            "batch.pop('position_ids')",
        )
    segments = read_positions(positions, lengths)
    if segments is not None and (labels[np.diff(segments, axis=1, prepend=-1) != 0] != IGNORE)[1:].any():
        raise _refuse(
            "labels on the first token of a document that shares its row",
            "-100 there, as DataCollatorWithFlattening writes",
            "batch['labels'][batch['position_ids'] == 0] = -100",
        )
    return segments


def _refuse(received: str, required: str, remedy: str) -> DataError:
    return DataError(f"the data_collator returned {received}", required, remedy)
