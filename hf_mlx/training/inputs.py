"""From a collated batch on the host to the arrays a compiled step takes."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..data.buckets import bucket_length, pad_batch
from ..data.collate import Batch
from .loss import IGNORED

# Trained positions are gathered before the vocabulary projection when they are fewer than this share of
# the batch; above it the gather costs more than the logits it saves.
GATHER_BELOW = 0.75
# Gathered counts are rounded up to this many levels of B*T, which bounds the number of traces.
GATHER_LEVELS = 8


@dataclass(frozen=True)
class Inputs:
    """One micro-batch, ready for the device.

    Attributes:
        arrays: ``input_ids`` (B, T) int32; ``targets`` (N,) int32, the next token of each scored position or
            -100; ``positions`` (N,) int32 into the flattened B*T (absent when N = B*T); ``segments`` (B, T)
            int32 (absent unless packed); ``width`` float32 scalar, the row length before bucketing; ``lengths`` (B,)
            int32, the positions of each row that upstream's attention mask lets through.
        valid: Number of scored tokens, ``(labels[:, 1:] != -100).sum()``.
        tokens: What counts towards ``num_tokens``.
        padding: Positions added by padding and bucketing.
        labelled: ``(labels != -100).sum()``, the first label of each row included, which nothing predicts.
    """

    arrays: dict[str, mx.array]
    valid: int
    tokens: int
    padding: int
    labelled: int = 0


def make_inputs(batch: Batch, pad_token_id: int, *, max_length: int | None = None) -> Inputs:
    """Pad ``batch`` to its length bucket and shift its labels.

    Labels are shifted instead of inputs, so matmul shapes stay aligned; the last position of a row scores nothing.
    """
    width = batch.input_ids.shape[1]
    padded = pad_batch(batch, bucket_length(width, max_length), pad_token_id)
    rows, length = padded.input_ids.shape
    targets = np.full((rows, length), IGNORED, np.int32)
    targets[:, :-1] = padded.labels[:, 1:]
    flat = targets.reshape(-1)
    scored = np.flatnonzero(flat != IGNORED)
    # A padding-free row has no mask: its padding counts.
    lengths = batch.lengths if rows > 1 else np.array([batch.num_tokens], np.int32)
    arrays = {
        "input_ids": mx.array(padded.input_ids),
        "width": mx.array(float(width)),
        "lengths": mx.array(lengths),
    }
    if len(scored) < GATHER_BELOW * flat.size:
        level = max(flat.size // GATHER_LEVELS, 1)
        count = min(max(-(-len(scored) // level), 1) * level, flat.size)
        positions = np.zeros(count, np.int32)
        positions[: len(scored)] = scored
        flat = np.concatenate([flat[scored], np.full(count - len(scored), IGNORED, np.int32)])
        arrays["positions"] = mx.array(positions)
    arrays["targets"] = mx.array(flat)
    if padded.segments is not None:
        arrays["segments"] = mx.array(padded.segments)
    labelled = int((batch.labels != IGNORED).sum())
    return Inputs(arrays, len(scored), batch.num_tokens, rows * length - int(batch.lengths.sum()), labelled)
