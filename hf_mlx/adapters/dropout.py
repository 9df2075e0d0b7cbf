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

    def bind(self, keys: mx.array) -> None:
        """Draw the next masks from ``keys``, (B, 2) uint32: one for each row of the batch."""
        self._keys = keys

    def __call__(self, x: mx.array) -> mx.array:
        if not self.training or self.p == 0:
            return x
        mask = draw_by_row(lambda shape, key: mx.random.bernoulli(1 - self.p, shape, key=key), x.shape, self._keys)
        return mx.where(mask, x / (1 - self.p), mx.zeros_like(x))
