"""What the processes that hold one model together exchange of a window's gradients, inside the compiled step."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from ..adapters.tensor_parallel import Split
from .clip import norm_of, square_sum
from .optimizers.contract import Arrays


class SplitExchange:
    """Completes the gradients of what every process has whole, and measures all of them together.

    One sum for each dtype, with the squares of the divided arrays at the end of the float32 one. The metrics are the
    same on all processes as they are.

    Args:
        split: How the arrays lie.

    Attributes:
        in_model: The model exchanges as well, layer by layer, so its rows cannot go separate ways.
        kinds: What is treated alike, by name.
    """

    in_model = True
    rank, size = 0, 1

    def __init__(self, split: Split) -> None:
        self.split: Split | None = split
        self._group = split.world.group
        self.begin = split.world.begin
        self.kinds = dict.fromkeys(split.axes, "divided") | dict.fromkeys(split.partial, "partial")

    def extremes(self, metrics: Arrays) -> Arrays:
        """None: all processes read the same rows."""
        return {}

    def __call__(self, grads: Mapping[str, mx.array], metrics: Arrays) -> tuple[Arrays, Arrays, mx.array]:
        """The gradients of this process's arrays, the metrics, and the norm of the whole gradient (float32).

        Args:
            grads: By the names of the bundles.
            metrics: Left as they are.
        """
        squares = (square_sum(grads[name]) for name in grads if self.kinds.get(name) == "divided")
        divided = sum(squares, start=mx.array(0.0))
        lines: dict[mx.Dtype, list[str]] = {mx.float32: []}
        for name, grad in grads.items():
            if self.kinds.get(name) == "partial":
                lines.setdefault(grad.dtype, []).append(name)
        made = dict(grads)
        after: list[mx.array] = []
        for dtype, names in lines.items():
            parts = [grads[name].reshape(-1) for name in names]
            line = mx.concatenate([*parts, divided[None]] if dtype == mx.float32 else parts)
            # One after the other: processes that exchange in unlike orders add up what does not belong together.
            line = mx.distributed.all_sum(mx.depends([line], after)[0] if after else line, group=self._group)
            after, at = [line], 0
            for name in names:
                made[name] = line[at : at + grads[name].size].reshape(grads[name].shape)
                at += grads[name].size
            if dtype == mx.float32:
                divided = line[at]
        rest = (square_sum(made[name]) for name in made if self.kinds.get(name) != "divided")
        return made, metrics, norm_of([divided, *rest])
