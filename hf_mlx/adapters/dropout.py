"""Dropout as a pure function of explicit keys."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from .draws import draw_by_row


class KeyedDropout(nn.Module):
    """Dropout that draws its mask from keys it is given; before it is, from MLX's global generator.

    A block that is recomputed in the backward pass then drops what it dropped in the forward pass, a resumed run
    draws what the uninterrupted one would have drawn, and so does a micro-batch that is computed in pieces.

    Args:
        p: Probability of dropping an element; the rest is scaled by ``1 / (1 - p)``.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        # The underscore keeps it out of the parameters.
        self._keys: mx.array | None = None
        self._part = (0, 1)

    def bind(self, keys: mx.array) -> None:
        """Draw the next masks from ``keys``, (B, 2) uint32: one for each row of the batch."""
        self._keys = keys

    def divide(self, rank: int, ways: int) -> None:
        """Drop what falls to one of several processes, each of which sees an equal part of the last axis."""
        self._part = (rank, ways)

    def __call__(self, x: mx.array) -> mx.array:
        if not self.training or self.p == 0:
            return x
        rank, ways = self._part
        width = x.shape[-1]
        shape = (*x.shape[:-1], ways * width)
        mask = draw_by_row(lambda shape, key: mx.random.bernoulli(1 - self.p, shape, key=key), shape, self._keys)
        if ways > 1:
            mask = mask[..., rank * width : (rank + 1) * width]
        return mx.where(mask, x / (1 - self.p), mx.zeros_like(x))
