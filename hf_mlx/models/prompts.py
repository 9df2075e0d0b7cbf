"""Prompts that two answers share: computed once, handed to both answers through mlx-lm's ``cache`` argument."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models.rope_utils import SuScaledRoPE

from .architectures import can_pack
from .load import LoadedModel
from .masks import SegmentCache


class PromptCache(SegmentCache):
    """A cache that holds nothing: within one pass, rows of answers see the keys of the rows that hold their prompt.

    A unit of rows is a prompt, cut into runs of a row's width, and then the chosen and the rejected answer. An answer
    stands right behind its prompt, wherever that ends in its last row. Being without state, it goes through gradient
    checkpointing as any other argument does.

    Args:
        prompts: (P, 1) int32, tokens of each prompt.
        unit: Rows of a unit, at least 3.
        width: Of a row.
    """

    def __init__(self, prompts: mx.array, unit: int, width: int) -> None:
        pairs = prompts.shape[0]
        self._unit = unit
        starts = mx.broadcast_to(mx.arange(unit - 2) * width, (pairs, unit - 2))
        #: (R,) int32: the position of each row's first token.
        self.offset = mx.concatenate([starts, prompts, prompts], axis=1).reshape(-1).astype(mx.int32)
        self._is_prompt = mx.broadcast_to(mx.arange(unit) < unit - 2, (pairs, unit)).reshape(-1)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """The boolean mask (R, 1, N, keys): the prompt's positions and then the row's own, causal, in the window."""
        queries = self.offset[:, None] + mx.arange(N)
        shared = mx.broadcast_to(mx.arange((self._unit - 2) * N), (queries.shape[0], (self._unit - 2) * N))
        keys = mx.concatenate([shared, queries], axis=1)
        behind = queries[:, :, None] - keys[:, None, :]
        seen = behind >= 0
        if window_size is not None:
            seen = seen & (behind < window_size)
        # What lies behind the end of a prompt is padding there, and the positions of its answers' own tokens.
        own = mx.arange(keys.shape[1]) >= shared.shape[1]
        prompt = self._is_prompt[:, None]
        there = mx.where(own, mx.logical_not(prompt), prompt | (keys < self.offset[:, None]))
        return (seen & there[:, None, :])[:, None]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Keys and values (R, heads, N, size), those of the prompt in front."""
        return self._join(keys), self._join(values)

    def _join(self, x: mx.array) -> mx.array:
        _, heads, width, size = x.shape
        prompts = x.reshape(-1, self._unit, heads, width, size)[:, :-2]
        prompts = prompts.transpose(0, 2, 1, 3, 4).reshape(-1, heads, (self._unit - 2) * width, size)
        return mx.concatenate([mx.repeat(prompts, self._unit, axis=0), x], axis=2)


def prompt_cache(model: Any, prompts: mx.array, rows: int, width: int) -> list[PromptCache]:
    """A cache for ``model(input_ids, cache=…)`` whose rows are those of :class:`PromptCache`.

    Args:
        model: One that :func:`shares_prompts` accepts.
        prompts: (P, 1) int32, tokens of each prompt; may be traced by ``mx.compile``.
        rows, width: Of ``input_ids``.
    """
    return [PromptCache(prompts, rows // prompts.shape[0], width)] * len(model.layers)


def shares_prompts(loaded: LoadedModel) -> bool:
    """Whether a model's layers take what they look at from the cache, and a position of its own for each row."""
    # This rotary embedding compares the offset with the length that it was trained for, on the host.
    scaled = any(isinstance(module, SuScaledRoPE) for module in loaded.model.modules())
    return can_pack(loaded.model_type) and not scaled
