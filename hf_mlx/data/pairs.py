"""Preference rows to a batch, and the batch to the arrays of a step.

trl lays out all chosen answers and then all rejected ones. Here the two of a pair are neighbours, so that a micro-batch
can be cut between pairs; no number depends on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import DataError
from .batch import IGNORE, Batch, read_numbers
from .custom import convert_batch

REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


@dataclass(frozen=True, eq=False)
class PairBatch(Batch):
    """A :class:`~hf_mlx.data.batch.Batch` of 2P rows: chosen and rejected of the first pair, of the second, …

    Attributes:
        answers: (2P,) int32, tokens of each row's answer, one that nothing predicts included.
        reference: (2P,) float32, log-probability of each answer under the reference; None where it is computed.
    """

    answers: np.ndarray = None  # pyright: ignore[reportAssignmentType]
    reference: np.ndarray | None = None

    @property
    def collated_ids(self) -> np.ndarray:
        """All chosen rows, then all rejected ones."""
        return np.concatenate([self.input_ids[::2], self.input_ids[1::2]])

    @property
    def examples(self) -> int:
        """Pairs."""
        return len(self.input_ids) // 2


def collate_pairs(
    rows: Sequence[Mapping[str, Any]],
    *,
    pad_token_id: int,
    max_length: int | None,
    truncation_mode: str = "keep_start",
    pad_to_multiple_of: int | None = None,
) -> PairBatch:
    """Cuts and pads as trl 1.16 ``DataCollatorForPreference`` does.

    Args:
        rows: Dicts with ``prompt_ids``, ``chosen_ids``, ``rejected_ids`` and maybe the reference's columns.
        pad_token_id: Fills ``input_ids``.
        max_length: Tokens kept of a prompt with its answer; None keeps all.
        truncation_mode: Which end of them is kept.
        pad_to_multiple_of: Rounds the width up.
    """
    kept = slice(None) if max_length is None else slice(max_length)
    if max_length is not None and truncation_mode == "keep_end":
        kept = slice(-max_length, None)
    ids, labels = [], []
    for number, row in enumerate(rows):
        prompt = read_numbers(row, number, "prompt_ids")
        for column in ("chosen_ids", "rejected_ids"):
            answer = read_numbers(row, number, column)
            ids.append(np.concatenate([prompt, answer])[kept])
            labels.append(np.concatenate([np.full_like(prompt, IGNORE), answer])[kept])
    lengths = np.array([len(row) for row in ids], np.int32)
    width = int(lengths.max(initial=0))
    if pad_to_multiple_of:
        width = -(-width // pad_to_multiple_of) * pad_to_multiple_of
    filled = [np.full((len(ids), width), value, np.int32) for value in (pad_token_id, IGNORE)]
    for into, sequences in zip(filled, (ids, labels), strict=True):
        for at, sequence in enumerate(sequences):
            into[at, : len(sequence)] = sequence
    reference = None
    if all(column in rows[0] for column in REFERENCE_COLUMNS):
        reference = np.array([[row[c] for c in REFERENCE_COLUMNS] for row in rows], np.float32).reshape(-1)
    answers = np.array([(label != IGNORE).sum() for label in labels], np.int32)
    ids_array, label_array = filled
    return PairBatch(ids_array, label_array, lengths, int(lengths.sum()), answers=answers, reference=reference)


def convert_pairs(mapping: Mapping[str, Any]) -> PairBatch:
    """What a user's collator returned in trl's layout, as a :class:`PairBatch`.

    Args:
        mapping: ``input_ids``, ``completion_mask`` and mostly ``attention_mask`` (2P, T), all chosen rows first, and
            maybe the reference's columns (P,).

    Raises:
        DataError: Columns that are missing, unknown or of other shapes, or a mask with holes.
    """
    if not isinstance(mapping, Mapping) or "completion_mask" not in mapping or "input_ids" not in mapping:
        found = sorted(mapping) if isinstance(mapping, Mapping) else type(mapping).__name__
        raise DataError(
            f"a data_collator that returns {found}",
            "input_ids, attention_mask and completion_mask, all chosen rows and then all rejected ones",
            "trl.trainer.dpo_trainer.DataCollatorForPreference shows the layout",
        )
    given = dict(mapping)
    reference = [given.pop(column, None) for column in REFERENCE_COLUMNS]
    mask = _to_numpy(given.pop("completion_mask")) != 0
    ids = _to_numpy(given["input_ids"])
    if ids.ndim != 2 or ids.shape != mask.shape or len(ids) % 2:
        raise DataError(
            f"a data_collator's input_ids of shape {ids.shape} and completion_mask of {mask.shape}",
            "(2P, T) each, all chosen rows and then all rejected ones",
            "pad both to one length",
        )
    batch = convert_batch({**given, "labels": np.where(mask, ids, IGNORE)})
    order = np.arange(len(ids)).reshape(2, -1).T.reshape(-1)
    return PairBatch(
        batch.input_ids[order],
        batch.labels[order],
        batch.lengths[order],
        batch.num_tokens,
        None if batch.segments is None else batch.segments[order],
        batch.has_mask,
        answers=mask.sum(axis=1).astype(np.int32)[order],
        reference=None
        if any(part is None for part in reference)
        else np.concatenate([_to_numpy(part) for part in reference]).astype(np.float32)[order],
    )


def pair_arrays(batch: PairBatch, targets: np.ndarray, splits: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """What a pair objective reads beside the tokens, as numpy arrays.

    Args:
        batch: Of :func:`collate_pairs` or :func:`convert_pairs`.
        targets: (R, width) int32, the next token of each position as it is computed, or -100.
        splits: (P, 1) int32 where both answers of a pair share a row: where in it the rejected one begins. None where
            each has a row of its own.

    Returns:
        ``shared`` (R, width) bool, False where a target lies past the shorter answer of its pair; ``answers`` float32
        and, where it is known, ``reference`` float32, of each row's answers, (R, 2P / R); and the counts of the
        micro-batch, float32 scalars that are at least 1: ``pairs``, ``tokens``, ``chosen_tokens``, ``rejected_tokens``.
    """
    rows, width = targets.shape
    scored = targets != IGNORE
    # (P, 2, places): of each place whether the answer has a target there.
    if splits is None:
        answered = scored.reshape(-1, 2, width)
    else:
        is_chosen = np.arange(width) < splits
        answered = np.stack([scored & is_chosen, scored & ~is_chosen], axis=1)
    counts = answered.sum(axis=2)
    arrays = {
        "answers": batch.answers.reshape(rows, -1).astype(np.float32),
        "pairs": len(counts),
        "tokens": counts.sum(),
        "chosen_tokens": counts[:, 0].sum(),
        "rejected_tokens": counts[:, 1].sum(),
    }
    arrays = {k: np.array(max(v, 1), np.float32) if np.ndim(v) == 0 else v for k, v in arrays.items()}
    if batch.reference is not None:
        arrays["reference"] = batch.reference.reshape(rows, -1)
    shared = answered & (np.cumsum(answered, axis=2) <= counts.min(axis=1)[:, None, None])
    return arrays | {"shared": shared.reshape(targets.shape) if splits is None else shared.any(axis=1)}


def _to_numpy(value: Any) -> np.ndarray:
    return np.asarray(value.detach().cpu().numpy() if hasattr(value, "detach") else value)
