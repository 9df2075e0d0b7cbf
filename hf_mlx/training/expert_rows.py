"""The rows of a mixture in the order of their experts, one by one or in tiles that have one expert each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .take_rows import take_rows


def most_tiles(choices: int, size: int, experts: int) -> int:
    """How many tiles of ``size`` rows hold ``choices``, however the experts share them."""
    return choices // size + experts


@dataclass(frozen=True)
class ExpertRows:
    """Where each choice of an expert by a token lies among rows that are sorted by expert.

    Tiles begin with the first row of an expert, so the last tile of an expert, and some at the end, have rows that no
    choice fills: what is computed there is never read, and no gradient comes from there.

    Attributes:
        times: Choices of each token.
        size: Rows of a tile.
        experts: Of each tile, ascending, (tiles,).
        places: Row of each choice, (T · times,).
        choices: Choice at each row, the first one where there is none, (tiles · size,).
        filled: Whether there is one, (tiles · size, 1); None where every row has one.
    """

    times: int
    size: int
    experts: mx.array
    places: mx.array
    choices: mx.array
    filled: mx.array | None

    @classmethod
    def sort(cls, chosen: mx.array, times: int, size: int, experts: int) -> ExpertRows:
        """Lay out rows for what tokens chose.

        Args:
            chosen: Expert of each choice, token by token, (T · times,).
            times: Choices of each token.
            size: Rows of a tile; 1 leaves no row unfilled.
            experts: How many there are.
        """
        order = mx.argsort(chosen)
        numbers = mx.arange(order.size, dtype=order.dtype)
        places = mx.put_along_axis(mx.zeros_like(order), order, numbers, axis=0)
        if size == 1:
            return cls(times, size, chosen[order], places, order, None)
        counts = (chosen[:, None] == mx.arange(experts, dtype=chosen.dtype)).sum(axis=0)
        tiles = (counts + size - 1) // size
        ends = mx.cumsum(tiles)
        # How far the rows of an expert lie behind where they would without tiles.
        shift = (ends - tiles) * size - (mx.cumsum(counts) - counts)
        places = places + shift[chosen].astype(order.dtype)
        most = most_tiles(order.size, size, experts)
        choices = mx.put_along_axis(mx.full(most * size, order.size, order.dtype), places, numbers, axis=0)
        filled = choices < order.size
        of_tile = (ends <= mx.arange(most, dtype=ends.dtype)[:, None]).sum(axis=-1)
        of_tile = mx.minimum(of_tile, experts - 1).astype(chosen.dtype)
        return cls(times, size, of_tile, places, mx.where(filled, choices, 0), filled[:, None])

    def spread(self, x: mx.array) -> mx.array:
        """The rows of x (T, D) for their experts, (tiles, size, D)."""

        def forward(x: mx.array) -> mx.array:
            return take_rows(x, self.choices // self.times)

        spread: Any = mx.custom_function(forward)

        @spread.vjp
        def backward(x: mx.array, by_out: mx.array, _: mx.array) -> mx.array:
            by_choice = take_rows(by_out, self.places).reshape(-1, self.times, by_out.shape[-1])
            # Written out, the sum is one kernel with a float32 accumulator.
            rest = (by_choice[:, choice].astype(mx.float32) for choice in range(1, self.times))
            return sum(rest, by_choice[:, 0]).astype(x.dtype)

        return spread(x).reshape(-1, self.size, x.shape[-1])

    def gather(self, done: mx.array) -> mx.array:
        """Of done (tiles, size, D) the row of each choice, (T · times, D)."""
        gather: Any = mx.custom_function(lambda done: take_rows(done, self.places))

        @gather.vjp
        def backward(_: mx.array, by_out: mx.array, __: mx.array) -> mx.array:
            by_row = take_rows(by_out, self.choices)
            return by_row if self.filled is None else mx.where(self.filled, by_row, 0)

        return gather(done.reshape(-1, done.shape[-1]))

    def take_low(self, low: mx.array) -> mx.array:
        """Of what each token makes with every expert, (T, experts, r), the rows' own, (tiles, size, r)."""
        experts = mx.repeat(self.experts, self.size) if self.size > 1 else self.experts
        rows = self.choices // self.times * low.shape[1] + experts
        return low.reshape(-1, low.shape[-1])[rows].reshape(-1, self.size, low.shape[-1])
