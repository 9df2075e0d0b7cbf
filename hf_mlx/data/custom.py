"""What a user's own data_collator returned, as a batch; refused where a step would compute something else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import DataError
from .batch import IGNORE, Batch

# Made from position_ids by collators that flatten; they say nothing more.
DERIVED = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "num_items_in_batch"}
_READ = {"input_ids", "labels", "attention_mask", "position_ids"}


def convert_batch(mapping: Mapping[str, Any]) -> Batch:
    """Reads numpy arrays, torch tensors or lists into a :class:`Batch`.

    Args:
        mapping: ``input_ids`` and ``labels`` (B, T), optionally ``attention_mask`` (B, T) with padding on the right,
            and ``position_ids`` (B, T) that restart at 0 where a document starts.

    Raises:
        DataError: Columns that are missing, unknown or of other shapes, padding on the left, masks with holes,
            labels on padding, or positions that are not those of whole documents.
    """
    if not isinstance(mapping, Mapping):
        raise _refuse(f"a {type(mapping).__name__}", "a dict of arrays", "return {'input_ids': …, 'labels': …}")
    given = {key: value for key, value in mapping.items() if value is not None}
    if unknown := sorted(set(given) - _READ - DERIVED):
        names = ", ".join(unknown)
        raise _refuse(f"the keys {unknown}", f"only {sorted(_READ)}", f"leave out {names}: batch.pop({unknown[0]!r})")
    missing = [key for key in ("input_ids", "labels") if key not in given]
    if missing:
        raise _refuse(f"no {missing[0]!r} (keys {sorted(given)})", "input_ids and labels", "batch['labels'] = …")
    arrays = {key: read_array(given[key], key) for key in sorted(_READ & set(given))}
    ids, labels = arrays["input_ids"], arrays["labels"].copy()
    for key, array in arrays.items():
        if array.shape != ids.shape or ids.ndim != 2:
            raise _refuse(f"{key} of shape {array.shape}, input_ids of {ids.shape}", "(B, T) each", "pad to one length")
    mask = arrays.get("attention_mask")
    lengths = np.full(len(ids), ids.shape[1], np.int32) if mask is None else _read_mask(mask)
    _check_padding_labels(labels, lengths)
    segments = read_positions(arrays["position_ids"], lengths) if "position_ids" in arrays else None
    if segments is not None:
        starts = np.diff(segments, axis=1, prepend=-1) != 0
        labels[starts & (np.arange(ids.shape[1]) < lengths[:, None])] = IGNORE
    tokens = ids.size if mask is None else int(lengths.sum())
    return Batch(ids, labels, lengths, tokens, segments, has_mask=mask is not None)


def read_array(value: Any, key: str) -> np.ndarray:
    """Integers as int32, from numpy, torch or lists."""
    if hasattr(value, "detach"):  # a torch tensor, on whatever device
        value = value.detach().cpu().numpy()
    try:
        array = np.asarray(value)
    except ValueError:
        raise _refuse(f"{key} with rows of different lengths", "(B, T)", "pad the rows to one length") from None
    if array.dtype.kind not in "iub":
        raise _refuse(f"{key} of dtype {array.dtype}", "integers", f"batch[{key!r}] = batch[{key!r}].long()")
    return array.astype(np.int32)


def _read_mask(mask: np.ndarray) -> np.ndarray:
    """Row lengths of an attention mask of ones, then zeros."""
    lengths = (mask != 0).sum(axis=1).astype(np.int32)
    wanted = np.arange(mask.shape[1]) < lengths[:, None]
    wrong = np.flatnonzero(((mask != 0) != wanted).any(axis=1))
    if wrong.size:
        row = int(wrong[0])
        left = mask[row, 0] == 0
        raise _refuse(
            f"an attention_mask that {'pads on the left' if left else 'has holes'} in row {row}",
            "padding on the right: a causal model then sees the same tokens with or without a mask",
            "tokenizer.padding_side = 'right'" if left else "leave the masked tokens out of input_ids",
        )
    return lengths


def _check_padding_labels(labels: np.ndarray, lengths: np.ndarray) -> None:
    # The first label past the end is still predicted from a real token; later ones would be predicted from padding.
    wrong = np.flatnonzero(((np.arange(labels.shape[1]) > lengths[:, None]) & (labels != IGNORE)).any(axis=1))
    if wrong.size:
        raise _refuse(
            f"labels other than -100 on the padding of row {int(wrong[0])}",
            "-100 wherever attention_mask is 0",
            "batch['labels'][batch['attention_mask'] == 0] = -100",
        )


def read_positions(positions: np.ndarray, lengths: np.ndarray) -> np.ndarray | None:
    """Document numbers from positions that restart at 0; None where each row is one document."""
    real = np.arange(positions.shape[1]) < lengths[:, None]
    steps = np.diff(positions, axis=1, prepend=-1)
    wrong = np.flatnonzero((real & (positions != 0) & (steps != 1)).any(axis=1))
    if wrong.size:
        raise _refuse(
            f"position_ids of row {int(wrong[0])} that neither count up by one nor restart at 0",
            "0, 1, 2, … for each document",
            "leave position_ids out for rows of one document",
        )
    segments = np.cumsum(real & (positions == 0), axis=1, dtype=np.int32) - 1
    if (segments[real] == 0).all():
        return None
    return np.where(real, segments, segments.max(axis=1, keepdims=True) + 1).astype(np.int32)


def _refuse(received: str, required: str, remedy: str) -> DataError:
    return DataError(f"the data_collator returned {received}", required, remedy)
