"""Checkpointed blocks that keep attention, in rows so long that it is most of a block.

A recomputed block computes attention once more to go back through it, and attention grows with the square of the
length. Here a block is recomputed in two parts, before and after its attention, which stands between them with what
MLX's fused kernel keeps of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..adapters.layers import layer_dims
from .blocked_attention import attending, blocked_attention, is_fused
from .recompute import recompute
from .shared_rows import PromptCache

#: Tokens of a row from which attention's forward pass takes about as long as the products of a block do.
LEAST = 16384
#: One of so many blocks keeps its attention: the four arrays are about as large as the inputs of two or three blocks.
SHARE = 4
#: And no more blocks than this: with five of 16 MLX held 1.4 GiB more, and with eight 4 (an H200, mlx 0.32.4).
MOST = 4


def keeps_attention(block: nn.Module, place: int, blocks: int, tokens: int) -> bool:
    """Whether a checkpointed block keeps its attention: the last ones do, which the backward pass frees first.

    Args:
        block: Whose attention is recognised.
        place: Of the block among those that are checkpointed.
        blocks: How many are.
        tokens: Of a row.
    """
    recognised = sum(getattr(module, "in_blocks", False) for module in block.modules()) == 1
    return recognised and tokens >= LEAST and place >= blocks - min(blocks // SHARE, MOST)


def kept_features(block: nn.Module) -> int:
    """Numbers of a token in what is kept: about as many as the linear layers of attention give."""
    attention = [module for module in block.modules() if getattr(module, "in_blocks", False)]
    linear = (nn.Linear, nn.QuantizedLinear)
    return sum(layer_dims(part)[1] for module in attention for part in module.modules() if isinstance(part, linear))


def checkpoint_around_attention(run: Callable[..., Any], params: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """``recompute(run)(params, *args, **kwargs)``, which keeps the attention in it where MLX has a kernel for it.

    Args:
        run: A block as a function of its parameters and inputs.
        params: Its trainable arrays.
        args: Its inputs.
        kwargs: Those that have names.

    Returns:
        What ``run`` does.
    """
    noted: list[_Call] = []

    def before(params: Any, *args: Any, **kwargs: Any) -> tuple[mx.array, ...]:
        def stop(*arrays_and_rest: Any) -> mx.array:
            raise _Reached(_Call(*arrays_and_rest))

        try:
            with attending(stop):
                run(params, *args, **kwargs)
        except _Reached as reached:
            noted[:] = [reached.call]
            return reached.call.arrays
        return ()

    read = recompute(before)(params, *args, **kwargs)
    if not noted or not noted[0].is_fused:
        return recompute(run)(params, *args, **kwargs)
    attended = noted[0].attend(*read)

    def after(attended: mx.array, params: Any, *args: Any, **kwargs: Any) -> Any:
        with attending(lambda *_: attended):
            return run(params, *args, **kwargs)

    return recompute(after)(attended, params, *args, **kwargs)


@dataclass(frozen=True)
class _Call:
    """Arguments of :func:`blocked_attention`."""

    queries: mx.array
    keys: mx.array
    values: mx.array
    cache: Any
    scale: float
    mask: mx.array | str | None
    sinks: mx.array | None = None

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        return (self.queries, self.keys, self.values, *([] if self.sinks is None else [self.sinks]))

    @property
    def is_fused(self) -> bool:
        alone = not isinstance(self.cache, PromptCache)
        return alone and is_fused(self.queries.dtype, self.queries.shape[-1], self.values.shape[-1])

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, *sinks: mx.array) -> mx.array:
        return blocked_attention(queries, keys, values, self.cache, self.scale, self.mask, *sinks)


class _Reached(Exception):
    """A block has come to its attention."""

    def __init__(self, call: _Call) -> None:
        self.call = call
