"""Dropout as a pure function of an explicit key."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn


class KeyedDropout(nn.Module):
    """Dropout that draws its mask from a key it is given, not from MLX's global generator.

    A block that is recomputed in the backward pass then drops what it dropped in the forward pass, and a
    resumed run draws what the uninterrupted one would have drawn.

    Args:
        p: Probability of dropping an element; the rest is scaled by ``1 / (1 - p)``.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        # The underscore keeps it out of the parameters.
        self._key: mx.array | None = None

    def bind(self, key: mx.array) -> None:
        """Draw the next masks from ``key``."""
        self._key = key

    def __call__(self, x: mx.array) -> mx.array:
        if not self.training or self.p == 0:
            return x
        mask = mx.random.bernoulli(1 - self.p, x.shape, key=self._key)
        return mx.where(mask, x / (1 - self.p), mx.zeros_like(x))
