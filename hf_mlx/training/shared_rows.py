"""Prompts that two answers share: everything is computed for one row of a pair, and attention alone for two.

Such a row holds the prompt, the chosen answer and the rejected one. Its tokens go through a model as rows of one token,
each with its position (mlx-lm's models take a position for each row, from the ``cache`` argument). Within attention the
prompt with either answer becomes a sequence again, under a plain causal mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx_lm.models.rope_utils import DynamicNTKScalingRoPE, SuScaledRoPE

from ..device import on_cuda
from ..models.load import LoadedModel
from ..models.masks import Causal, RowCache
from ..models.overrides.rope import LongRope
from .take_rows import take_rows
from .windows import is_reached

_SCALED = (LongRope, SuScaledRoPE, DynamicNTKScalingRoPE)
#: Features that a rotary embedding turns at least, for rows of one token on CUDA.
NARROWEST = 32

#: (queries, keys, values, mask) of sequences -> (B, heads, S, D).
Attend = Callable[[mx.array, mx.array, mx.array, Any], mx.array]


class PromptCache(RowCache):
    """A cache that holds nothing: it knows where each token of a pair's row stands in the pair's two sequences.

    Being without state, it goes through gradient checkpointing as any other argument does.

    Args:
        offsets: (P, T) int32, the position of each token in its sequence.
        slots: (P, T) int32, where each token stands among the 2 S slots of its pair, the prompt with the chosen answer
            and then with the rejected one: a prompt's tokens in the first, padding in a slot that is read nowhere.
        rejected: (P, S) int32, where in its row each token of the prompt with the rejected answer stands. The prompt
            with the chosen answer is the beginning of the row.

    Attributes:
        offset: (P * T,) int32, the position of each token.
    """

    def __init__(self, offsets: mx.array, slots: mx.array, rejected: mx.array) -> None:
        (pairs, width), length = offsets.shape, rejected.shape[1]
        self._length = length
        self.offset = offsets.reshape(-1)
        columns, places = mx.arange(width), mx.arange(length)
        rows, first = mx.arange(pairs)[:, None] * width, mx.arange(pairs)[:, None] * (2 * length)
        # The token of each slot, and the slot of each token.
        held = mx.concatenate([mx.broadcast_to(places, rejected.shape), rejected], axis=1)
        self._tokens, self._slots = (held + rows).reshape(-1), (slots + first).reshape(-1)
        # Where a token of the prompt stands a second time.
        again = mx.pad(rejected == places, [(0, 0), (0, width - length)])
        self._again = (mx.where(again, columns + length, 0) + first).reshape(-1)
        self._is_again = again.reshape(-1, 1)
        self._is_held = (self._tokens[self._slots] == mx.arange(pairs * width))[:, None]
        self._is_first = (self._slots[self._tokens] == mx.arange(2 * pairs * length))[:, None]

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """What :meth:`attend` makes the mask of."""
        return Causal(window_size)

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, mask: Any, attend: Attend) -> mx.array:
        """Attention of tokens, each to the prompt and to its own answer.

        Args:
            queries, keys, values: (P * T, heads, 1, size), one row for each token.
            mask: Of :meth:`make_mask`.
            attend: What computes it for sequences.

        Returns:
            (P * T, heads, 1, size).
        """
        window = mask.window
        short = window is None or window >= self._length
        seen = "causal" if short else Causal(window)
        once = self._to_sequences(queries, twice=False)
        found = attend(once, self._to_sequences(keys), self._to_sequences(values), seen)
        _, heads, _, size = found.shape
        return self._to_tokens(found.transpose(0, 2, 1, 3).reshape(-1, heads * size)).reshape(-1, heads, 1, size)

    def _to_sequences(self, x: mx.array, twice: bool = True) -> mx.array:
        """(P * T, heads, 1, size) to (2P, heads, S, size).

        ``twice`` adds up what comes back for a prompt from both sequences. To queries nothing does from the second, nor
        from a slot without a token, since no output of theirs is read.
        """
        _, heads, _, size = x.shape
        gather: Any = mx.custom_function(lambda x: take_rows(x, self._tokens))

        @gather.vjp
        def backward(_: Any, cotangent: mx.array, output: Any) -> mx.array:
            # Gathered, where MLX's own would add up in a scatter.
            own = take_rows(cotangent, self._slots)
            if not twice:
                return own
            again = mx.where(self._is_again, take_rows(cotangent, self._again), 0)
            return mx.where(self._is_held, own, 0) + again

        return gather(x.reshape(-1, heads * size)).reshape(-1, self._length, heads, size).transpose(0, 2, 1, 3)

    def _to_tokens(self, x: mx.array) -> mx.array:
        """(2P * S, …) to (P * T, …); a prompt's from the sequence of the chosen answer."""
        gather: Any = mx.custom_function(lambda x: take_rows(x, self._slots))
        gather.vjp(lambda _, cotangent, output: mx.where(self._is_first, take_rows(cotangent, self._tokens), 0))
        return gather(x)


def prompt_cache(model: Any, offsets: mx.array, slots: mx.array, rejected: mx.array) -> list[PromptCache]:
    """A cache for ``model(input_ids, cache=…)`` with ``input_ids`` (P * T, 1), the tokens of pairs' rows.

    Args:
        model: One whose attention :func:`~hf_mlx.training.blocked_attention.attend_in_blocks` reaches in every layer.
        offsets, slots, rejected: Of :class:`PromptCache`; may be traced by ``mx.compile``.
    """
    return [PromptCache(offsets, slots, rejected)] * len(model.layers)


def shares_prompts(loaded: LoadedModel) -> bool:
    """Whether a model's layers take a position of its own for each row, and attention that is replaced is all they do.

    Asked once :func:`~hf_mlx.training.blocked_attention.attend_in_blocks` was called.
    """
    turning = [module for module in loaded.model.modules() if "rope" in type(module).__name__.lower()]
    # These compare positions with the length that a model was trained for, on the host.
    scaled = any(isinstance(module, _SCALED) for module in turning)
    # mx.fast.rope turns rows of one token in CUDA blocks of up to 1,024 numbers, of which no more than 64 may be rows
    # (mlx 0.32.4: "cudaGraphAddKernelNode failed: invalid argument").
    narrow = on_cuda() and any(getattr(module, "dims", NARROWEST) < NARROWEST for module in turning)
    return is_reached(loaded) and not scaled and not narrow
