"""Clipping of a window's gradients, inside the compiled step."""

from __future__ import annotations

import mlx.core as mx

from ..settings.clipping import GradClip
from .optimizers.contract import Arrays
from .sums import blocked_sum

# torch 2.13, torch.nn.utils.clip_grads_with_norm_
CLIP_EPS = 1e-6


def clip_gradients(grads: Arrays, clip: GradClip) -> tuple[Arrays, mx.array | None, mx.array]:
    """Apply ``clip``.

    Returns:
        The gradients, a float32 factor still to be multiplied in (None for none; the optimizer folds it into its
        update, so no clipped copy of the tree exists), and the global L2 norm before clipping, in float32.
    """
    squares = (blocked_sum(mx.square(g.reshape(-1).astype(mx.float32))) for g in grads.values())
    norm = mx.sqrt(sum(squares, start=mx.array(0.0)))
    if clip.mode == "norm":
        return grads, mx.minimum(clip.threshold / (norm + CLIP_EPS), 1.0), norm
    if clip.mode == "value":
        return {k: mx.clip(g, -clip.threshold, clip.threshold) for k, g in grads.items()}, None, norm
    return grads, None, norm


def clip_whole(grads: Arrays, clip: GradClip) -> tuple[Arrays, mx.array]:
    """The clipped gradients themselves, for what is no part of the compiled update; and the norm before clipping."""
    grads, scale, norm = clip_gradients(grads, clip)
    if scale is not None:
        grads = {name: (grad * scale).astype(grad.dtype) for name, grad in grads.items()}
    return grads, norm
