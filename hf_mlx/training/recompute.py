"""Functions that are computed once more on the way back, and not before that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map


def recompute(function: Callable[..., Any]) -> Callable[..., Any]:
    """``mx.checkpoint(function)``, whose second computation waits for the gradient by its outputs.

    MLX's own waits for the outputs alone, so all blocks of a model may be computed once more before the first of them
    goes back: whether they are depends on the order that MLX chooses for the graph.

    Args:
        function: Of trees of arrays and anything else; gradients flow through its arguments alone.

    Returns:
        The same function; only its arguments are kept for the backward pass.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        given, arrays = _take_arrays((args, kwargs))
        returned: list[Any] = []

        def forward(*arrays: mx.array) -> list[mx.array]:
            args, kwargs = _put_arrays(given, arrays)
            outputs, flat = _take_arrays(function(*args, **kwargs))
            returned[:] = [outputs]
            return flat

        def backward(primals: Any, cotangents: Any, _: Any) -> tuple[mx.array, ...]:
            # MLX hands over a single array as it is.
            primals, cotangents = ([x] if isinstance(x, mx.array) else list(x) for x in (primals, cotangents))
            return tuple(mx.vjp(forward, mx.depends(primals, cotangents), cotangents)[1])

        forgetful: Any = mx.custom_function(forward)
        forgetful.vjp(backward)
        flat = forgetful(*arrays)
        return _put_arrays(returned[0], flat)

    return call


class _Place:
    """Where an array was in a tree."""


def _take_arrays(tree: Any) -> tuple[Any, list[mx.array]]:
    arrays: list[mx.array] = []

    def take(leaf: Any) -> Any:
        if not isinstance(leaf, mx.array):
            return leaf
        arrays.append(leaf)
        return _Place

    return tree_map(take, tree), arrays


def _put_arrays(tree: Any, arrays: Any) -> Any:
    left = iter(arrays)
    return tree_map(lambda leaf: next(left) if leaf is _Place else leaf, tree)
