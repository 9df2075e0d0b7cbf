"""From a collated batch on the host to the arrays a compiled step takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..data.buckets import bucket_length, pad_batch
from ..data.collate import Batch
from ..data.documents import counted_lengths
from ..data.layout import Rows, lay_out, shift_labels
from ..data.masked import needs_keys
from ..data.shapes import Shape, Shapes
from .loss import IGNORED

#: What processes tell each other of every micro-batch, in this order: fields of :class:`Peers`.
PEER_COLUMNS = ("valid", "labelled", "tokens", "positions", "real", "chosen", "pairs")


class Counted(NamedTuple):
    """What means are taken over, by rank: scored tokens, those of chosen answers, and pairs."""

    valid: tuple[int, ...]
    chosen: tuple[int, ...]
    pairs: tuple[int, ...]


@dataclass(frozen=True)
class Peers:
    """What the micro-batches count that all processes compute at the same time.

    Attributes:
        rank: Of this process.
        valid, labelled, tokens: By rank, as of :class:`Inputs`.
        positions, real: By rank, the positions of the collated batch, and those that are no padding.
        chosen, pairs: By rank, as of :class:`Inputs`.
        kept: Of how many processes, the first ones, metrics count: fewer at the end of an epoch.
        remainder: Rows of the last round of an epoch that are no repetition, where it is not full; else 0.
        average: A window is divided by the tokens of all processes (``average_tokens_across_devices``).
    """

    rank: int
    valid: tuple[int, ...]
    labelled: tuple[int, ...]
    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    real: tuple[int, ...]
    chosen: tuple[int, ...]
    pairs: tuple[int, ...]
    kept: int
    remainder: int = 0
    average: bool = True

    @property
    def size(self) -> int:
        """How many processes there are."""
        return len(self.valid)

    @property
    def counted(self) -> Counted:
        """What means are taken over."""
        return Counted(self.valid, self.chosen, self.pairs)

    @property
    def kept_tokens(self) -> int:
        """What counts towards ``num_tokens``."""
        return sum(self.tokens[: self.kept])


@dataclass(frozen=True)
class Inputs:
    """One micro-batch, ready for the device.

    Attributes:
        arrays: ``input_ids`` (R, W) int32; ``targets`` (N,) int32, the next token of each scored position or
            -100; ``positions`` (N,) int32 into the flattened R*W (absent when N = R*W); ``segments`` (R, W)
            int32 (absent unless rows hold several documents); ``width`` float32 scalar, the row length that the
            collator made; ``lengths`` (R,) int32, the positions of each row that upstream's attention mask lets
            through.
        valid: Number of scored tokens, ``(labels[:, 1:] != -100).sum()``.
        tokens: What counts towards ``num_tokens``.
        padding: Positions that hold no token of the dataset.
        labelled: ``(labels != -100).sum()``, the first label of each row included, which nothing predicts.
        batch: What the collator made, where a loss of the script's own reads it.
        chosen: Of pairs of answers, the scored tokens of the chosen ones.
        pairs: How many pairs there are; 0 where rows are no pairs.
        peers: Of several processes, what all of them count at the same time.
    """

    arrays: dict[str, mx.array]
    valid: int
    tokens: int
    padding: int
    labelled: int = 0
    batch: Batch | None = None
    chosen: int = 0
    pairs: int = 0
    peers: Peers | None = None


@dataclass(frozen=True)
class HostInputs:
    """:class:`Inputs` before they go to the device; ``arrays`` are numpy's."""

    arrays: dict[str, np.ndarray]
    valid: int
    tokens: int
    padding: int
    labelled: int
    batch: Batch | None = None
    chosen: int = 0
    pairs: int = 0

    def to_device(self) -> Inputs:
        """The same as MLX arrays."""
        arrays = {name: mx.array(array) for name, array in self.arrays.items()}
        return Inputs(arrays, self.valid, self.tokens, self.padding, self.labelled, self.batch, self.chosen, self.pairs)


def make_inputs(batch: Batch, pad_token_id: int, shapes: Shapes | None = None, *, limit: int | None = None) -> Inputs:
    """:func:`make_host_inputs`, on the device."""
    return make_host_inputs(batch, pad_token_id, shapes, limit=limit).to_device()


def make_host_inputs(
    batch: Batch, pad_token_id: int, shapes: Shapes | None = None, *, limit: int | None = None
) -> HostInputs:
    """Shift the labels of ``batch`` and lay its documents into rows of one of the shapes. MLX has no part in it.

    Labels are shifted instead of inputs, so matmul shapes stay aligned; the last token of a document scores nothing.

    Args:
        batch: Of a collator.
        pad_token_id: Fills what is padding.
        shapes: Those of the run. None keeps the rows as they are and pads them to their length bucket.
        limit: Positions that the model has; rows that are kept are padded to no more.
    """
    masked = needs_keys(batch)
    placed = None if shapes is None or masked else shapes.place(batch)
    if placed is None:
        rows, shape = _keep_rows(batch, pad_token_id, limit), None
    else:
        shape = placed.shape
        rows = lay_out(batch, placed, pad_token_id)
    arrays = {
        "input_ids": rows.input_ids,
        "width": np.array(batch.input_ids.shape[1], np.float32),
        "lengths": rows.lengths,
    }
    arrays |= gather_scored(rows.targets, shape)
    if rows.segments is not None:
        arrays["segments"] = rows.segments
    if batch.keys is not None and (masked or shapes is None):
        keys = np.zeros(rows.input_ids.shape, bool)
        keys[:, : batch.keys.shape[1]] = batch.keys
        arrays["keys" if masked else "shown_keys"] = keys
    valid, labelled = int((rows.targets != IGNORED).sum()), int((batch.labels != IGNORED).sum())
    padding = rows.input_ids.size - int(batch.lengths.sum())
    return HostInputs(arrays, valid, batch.num_tokens, padding, labelled)


def gather_scored(targets: np.ndarray, shape: Shape | None = None) -> dict[str, np.ndarray]:
    """The targets (R, W) int32 as a step takes them: of few positions, where projecting those alone is cheaper.

    Args:
        targets: The next token of each position, or -100.
        shape: Says how many are gathered; None takes the fixed table's counts.

    Returns:
        ``targets`` (N,) and, where N < R*W, ``positions`` (N,); see :class:`Inputs`.
    """
    flat = targets.reshape(-1)
    scored = np.flatnonzero(flat != IGNORED)
    count = (shape or Shape(targets.shape[0], targets.shape[1], False)).gathered(len(scored))
    if count is None:
        return {"targets": flat}
    positions = np.zeros(count, np.int32)
    positions[: len(scored)] = scored
    flat = np.concatenate([flat[scored], np.full(count - len(scored), IGNORED, np.int32)])
    return {"positions": positions, "targets": flat}


def _keep_rows(batch: Batch, pad_token_id: int, limit: int | None) -> Rows:
    padded = pad_batch(batch, bucket_length(batch.input_ids.shape[1], limit), pad_token_id)
    return Rows(padded.input_ids, shift_labels(padded.labels), padded.segments, counted_lengths(batch))
