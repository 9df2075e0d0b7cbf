"""Random draws that belong to a row, so that they do not depend on the rows it is computed with."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

# Draws an array of a shape from a key; from MLX's global generator without one.
Draw = Callable[[tuple[int, ...], mx.array | None], mx.array]


def row_keys(key: mx.array, rows: mx.array) -> mx.array:
    """One key for each row, (B, 2) uint32.

    MLX's generator is threefry, whose outputs for neighbouring keys are independent (Random123, Salmon et al. 2011).

    Args:
        key: (2,) uint32, of the micro-batch.
        rows: (B,) uint32, the number of each row in its micro-batch.
    """
    return mx.stack([mx.broadcast_to(key[0], rows.shape), key[1] + rows], axis=-1)


def draw_by_row(draw: Draw, shape: tuple[int, ...], keys: mx.array | None) -> mx.array:
    """An array of ``shape``, each row of which is drawn from its own key.

    Args:
        draw: E.g. ``lambda shape, key: mx.random.uniform(shape=shape, key=key)``.
        shape: (B, ...); where the first axis is something else than rows, all is drawn from the first key.
        keys: (B, 2) uint32; None draws from MLX's global generator.
    """
    if keys is None:
        return draw(shape, None)
    if len(shape) < 3 or shape[0] != keys.shape[0]:
        return draw(shape, keys[0])
    return mx.vmap(lambda key: draw(shape[1:], key))(keys)
