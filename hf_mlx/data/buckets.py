"""Few batch lengths, so that the compiled step is traced few times.

Lengths go up in steps of 32 to 256 and then in eight steps an octave: 256, 288, … 512, 576, … 1024, 1152, …
That is 8 lengths up to 256, 24 up to 1,024, and 80 up to 131,072. Above 256 less than one token in nine is padding;
below, fewer than 32 tokens of a row are.
"""

from __future__ import annotations

import numpy as np

from .batch import IGNORE, Batch

_STEP = 32
_LINEAR = 256


def bucket_length(n: int, limit: int | None = None) -> int:
    """The length a batch of length ``n`` is padded to.

    Args:
        n: Tokens in the longest row, at least 1.
        limit: The longest length a run uses (``max_length``); a bucket beyond it is cut to it. Never below ``n``.

    Returns:
        A bucket, at least ``n``.
    """
    step = _STEP if n <= _LINEAR else 1 << ((n - 1).bit_length() - 4)
    length = -(-n // step) * step
    return length if limit is None else max(n, min(length, limit))


def pad_batch(batch: Batch, length: int, pad_token_id: int) -> Batch:
    """Pads a batch on the right to ``length``. No number changes: causal attention keeps real tokens from seeing it.

    Labels are filled with -100, and the padding is a document of its own in ``segments``. ``lengths`` and
    ``num_tokens`` still count the real tokens.
    """
    extra = length - batch.input_ids.shape[1]
    if extra <= 0:
        return batch
    segments = batch.segments
    if segments is not None:
        own = segments.max(axis=1, keepdims=True) + 1
        segments = np.concatenate([segments, np.repeat(own, extra, axis=1)], axis=1).astype(np.int32)
    return Batch(
        _extend(batch.input_ids, extra, pad_token_id),
        _extend(batch.labels, extra, IGNORE),
        batch.lengths,
        batch.num_tokens,
        segments,
    )


def _extend(array: np.ndarray, extra: int, value: int) -> np.ndarray:
    return np.pad(array, ((0, 0), (0, extra)), constant_values=value)
