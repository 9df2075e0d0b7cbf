"""Pairs laid out so that the prompt which both answers share is computed once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .batch import IGNORE
from .buckets import bucket_length
from .pairs import PairBatch
from .shapes import Shape, padded_widths

#: A batch stays as it is unless this share of its positions suffices: attention pays for what is gathered.
WORTH = 0.95
# Counts of scored positions go up in so many steps an octave: each is a trace of its own.
_SCORED_STEPS = 4


@dataclass(frozen=True, eq=False)
class SharedPrompts:
    """One row for each pair: the prompt, the chosen answer, the rejected answer, padding.

    An answer begins with the last token of its prompt, which predicts the answer's first one.

    Attributes:
        input_ids: (P, T) int32.
        targets: (P, T) int32, the next token of each position that is scored, else -100.
        offsets: (P, T) int32, where each token stands in its own sequence, the prompt and one answer.
        slots: (P, T) int32, where it stands in both sequences of its pair, one behind the other.
        splits: (P, 1) int32, where in its row the rejected answer begins.
        rejected: (P, S) int32, where in its row each token of the prompt with the rejected answer stands. The prompt
            with the chosen answer is the beginning of the row. What lies behind the end of either is padding.
        tokens: Positions that hold a token.
    """

    input_ids: np.ndarray
    targets: np.ndarray
    offsets: np.ndarray
    slots: np.ndarray
    splits: np.ndarray
    rejected: np.ndarray
    tokens: int


def share_prompts(batch: PairBatch, pad_token_id: int, limit: int | None = None) -> SharedPrompts | None:
    """``batch`` with a row for each pair, or None where that is not possible or does not pay.

    Args:
        batch: Of :func:`~hf_mlx.data.pairs.collate_pairs` or :func:`~hf_mlx.data.pairs.convert_pairs`.
        pad_token_id: Fills what is padding.
        limit: Positions that the model has; no sequence is longer.
    """
    starts = _starts(batch)
    if starts is None:
        return None
    lengths = batch.lengths.reshape(-1, 2)
    sizes = lengths - starts[:, None]
    together = starts + sizes.sum(axis=1)
    width = bucket_length(int(together.max()))
    longest = int(lengths.max())
    sequence = pair_width(longest, 2 * len(starts), limit)
    if width > WORTH * 2 * sequence:
        return None
    # A sequence that is padded beyond its row would have nothing to be gathered from.
    width = max(width, sequence)
    ids = np.full((len(starts), width), pad_token_id, np.int32)
    targets = np.full(ids.shape, IGNORE, np.int32)
    for pair, (start, (chosen, rejected)) in enumerate(zip(starts, lengths, strict=True)):
        ids[pair, :chosen] = batch.input_ids[2 * pair, :chosen]
        ids[pair, chosen : chosen + rejected - start] = batch.input_ids[2 * pair + 1, start:rejected]
        for row, at, end in ((2 * pair, start, chosen), (2 * pair + 1, chosen, rejected)):
            scored = batch.labels[row, start + 1 : end]
            targets[pair, at : at + len(scored)] = scored
    splits, columns = lengths[:, :1], np.arange(width)
    is_rejected = columns >= splits
    offsets = columns - np.where(is_rejected, sizes[:, :1], 0)
    slots = offsets + sequence * is_rejected
    # A slot that is read nowhere: the second copy of the prompt, or the padding of one sequence.
    unread = np.where(starts > 0, sequence, np.where(lengths[:, 0] < sequence, sequence - 1, 2 * sequence - 1))
    is_padding = columns >= together[:, None]
    offsets, slots = np.where(is_padding, 0, offsets), np.where(is_padding, unread[:, None], slots)
    places = np.arange(sequence)
    rejected = np.minimum(places + np.where(places < starts[:, None], 0, sizes[:, :1]), width - 1)
    arrays = (array.astype(np.int32) for array in (offsets, slots, splits, rejected))
    return SharedPrompts(ids, targets, *arrays, tokens=int(together.sum()))


def scored_shape(targets: np.ndarray) -> Shape:
    """The shape of ``targets`` (R, W), with how many positions are gathered before the vocabulary projection."""
    count = int((targets != IGNORE).sum())
    step = max(1, (1 << max(count - 1, 1).bit_length()) // (2 * _SCORED_STEPS))
    count = -(-count // step) * step
    rows, width = targets.shape
    return Shape(rows, width, False, scored=(count,) if count < targets.size else ())


def pair_width(longest: int, rows: int, limit: int | None = None) -> int:
    """Width of rows that hold a prompt with its answer each."""
    width = min(padded_widths(longest), key=lambda width: Shape(rows, width, False).cost)
    return width if limit is None else max(longest, min(width, limit))


def _starts(batch: PairBatch) -> np.ndarray | None:
    """Where the rows of each pair begin to differ, in tokens; (P,). None where a pair has no prompt in common."""
    if batch.segments is not None or batch.keys is not None:
        return None
    scored = batch.labels != IGNORE
    if not scored.any(axis=1).all():
        return None
    first = scored.argmax(axis=1).reshape(-1, 2)
    if (first[:, 0] != first[:, 1]).any():
        return None
    # The last token of the prompt predicts the first of either answer, so each has it.
    starts = np.maximum(first[:, 0] - 1, 0)
    before = np.arange(batch.input_ids.shape[1]) < first[:, :1]
    chosen, rejected = batch.input_ids.reshape(-1, 2, batch.input_ids.shape[1]).transpose(1, 0, 2)
    return None if ((chosen != rejected) & before).any() else starts
