"""Pairs laid out so that the prompt which both answers share is computed once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from .batch import IGNORE
from .pairs import PairBatch
from .shapes import Shape, padded_widths

#: Rows of their own cost less than this, or the batch stays as it is: a mask and repeated keys are not free.
WORTH = 0.9


@dataclass(frozen=True, eq=False)
class SharedPrompts:
    """Units of rows, first to last: a prompt in runs of a row's width, the chosen answer, the rejected one.

    An answer's row begins with the last token of its prompt, which predicts the answer's first one.

    Attributes:
        input_ids: (R, W) int32, padded.
        targets: (R, W) int32, the next token of each position that is scored, else -100.
        prompts: (P, 1) int32, tokens of each prompt that stand in rows of their own.
        unit: Rows of a pair.
        tokens: Positions that hold a token.
    """

    input_ids: np.ndarray
    targets: np.ndarray
    prompts: np.ndarray
    unit: int
    tokens: int

    def spread(self, values: np.ndarray) -> np.ndarray:
        """What belongs to the answers (2P, …) as rows of the layout (R, …); 0 for the prompts' rows."""
        rows = np.zeros((len(self.prompts), self.unit, *values.shape[1:]), values.dtype)
        rows[:, -2:] = values.reshape(len(self.prompts), 2, *values.shape[1:])
        return rows.reshape(-1, *values.shape[1:])


def share_prompts(batch: PairBatch, pad_token_id: int, limit: int | None = None) -> SharedPrompts | None:
    """``batch`` with each prompt in rows of its own, or None where that is not possible or does not pay.

    Args:
        batch: Of :func:`~hf_mlx.data.pairs.collate_pairs` or :func:`~hf_mlx.data.pairs.convert_pairs`.
        pad_token_id: Fills what is padding.
        limit: Positions that the model has; no row is wider.
    """
    starts = _starts(batch)
    if starts is None:
        return None
    answers = int((batch.lengths - np.repeat(starts, 2)).max())
    width = pair_width(int(batch.lengths.max()), len(batch.lengths), limit)
    unit, shared, cost = _choose(int(starts.max()), answers, limit)
    if cost * len(starts) > WORTH * Shape(len(batch.lengths), width, False).cost:
        return None
    ids = np.full((len(starts), unit, shared), pad_token_id, np.int32)
    targets = np.full(ids.shape, IGNORE, np.int32)
    for pair, start in enumerate(starts):
        ids[pair, :-2].reshape(-1)[:start] = batch.input_ids[2 * pair, :start]
        for place in (-2, -1):
            row = 2 * pair + 2 + place
            end = int(batch.lengths[row])
            ids[pair, place, : end - start] = batch.input_ids[row, start:end]
            targets[pair, place, : max(end - start - 1, 0)] = batch.labels[row, start + 1 : end]
    tokens = int(batch.lengths.sum() - starts.sum())
    rows = (-1, shared)
    return SharedPrompts(ids.reshape(rows), targets.reshape(rows), starts[:, None].astype(np.int32), unit, tokens)


def pair_width(longest: int, rows: int, limit: int | None = None) -> int:
    """Width of rows that hold a prompt with its answer each."""
    return _clip(min(padded_widths(longest), key=lambda width: Shape(rows, width, False).cost), longest, limit)


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


def _choose(prompt: int, answer: int, limit: int | None) -> tuple[int, int, float]:
    """Rows of a pair, their width, and what a pair costs, for the longest prompt and answer of a batch."""
    widths = {_clip(width, answer, limit) for width in _widths(answer, prompt)}
    options = []
    for width in sorted(widths):
        runs = max(math.ceil(prompt / width), 1)
        options.append((_cost(runs, width), runs + 2, width))
    cost, unit, width = min(options)
    return unit, width, cost


def _widths(answer: int, prompt: int) -> Iterable[int]:
    yield from padded_widths(answer)
    if prompt > answer:
        yield from padded_widths(prompt)


def _cost(runs: int, width: int) -> float:
    # Every row looks at the keys of the whole prompt and at its own, under a mask.
    plain = Shape(runs + 2, width, True)
    return plain.size + (runs + 1) * (plain.cost - plain.size)


def _clip(width: int, needed: int, limit: int | None) -> int:
    return width if limit is None else max(needed, min(width, limit))
