"""Clipping of a window's gradients, inside the compiled step."""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx

from ..settings.clipping import GradClip
from .optimizers.contract import Arrays
from .sums import sum_of

# torch 2.13, torch.nn.utils.clip_grads_with_norm_
CLIP_EPS = 1e-6


def square_sum(grad: mx.array) -> mx.array:
    """The sum of the squares of all elements, float32."""
    return sum_of(lambda g: mx.square(g.astype(mx.float32)), grad.reshape(-1))


def norm_of(squares: Iterable[mx.array]) -> mx.array:
    """The L2 norm of all gradients together, float32, from the :func:`square_sum` of each."""
    return mx.sqrt(sum(squares, start=mx.array(0.0)))


def clip_gradients(grads: Arrays, clip: GradClip, norm: mx.array) -> tuple[Arrays, mx.array | None]:
    """Apply ``clip``.

    Args:
        grads: By name.
        clip: Which clip.
        norm: Of the whole gradient, float32.

    Returns:
        The gradients, and a float32 factor still to be multiplied in: None for none; the optimizer folds it into its
        update, so no clipped copy of the tree exists.
    """
    if clip.mode == "norm":
        return grads, mx.minimum(clip.threshold / (norm + CLIP_EPS), 1.0)
    if clip.mode == "value":
        return {k: mx.clip(g, -clip.threshold, clip.threshold) for k, g in grads.items()}, None
    return grads, None


def clip_whole(grads: Arrays, clip: GradClip, norm: mx.array) -> Arrays:
    """The clipped gradients themselves, for what is no part of the compiled update."""
    grads, scale = clip_gradients(grads, clip, norm)
    if scale is not None:
        grads = {name: (grad * scale).astype(grad.dtype) for name, grad in grads.items()}
    return grads
