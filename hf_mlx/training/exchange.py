"""The sum of a window's gradients over all processes, inside the compiled step."""

from __future__ import annotations

import math
from typing import Protocol

import mlx.core as mx

from ..adapters.tensor_parallel import Split
from ..processes.world import World
from .bundles import LARGEST
from .clip import norm_of, square_sum
from .optimizers.contract import Arrays
from .scores import EXTREMES

# Each process counts its own.
_KEPT = ("micro_batches",)
#: By name among the metrics of a step: the loss as this process alone sees it, as it is under torch's DDP.
OWN_LOSS = "own_loss"


class GradientExchange(Protocol):
    """What the processes of a run exchange of a window.

    Attributes:
        rank, size: Which process this is, of how many that read rows of their own.
        in_model: The model exchanges as well, layer by layer.
        kinds: Names that no bundle mixes with others, by what tells them apart.
        split: How the arrays lie where the processes hold one model together.
    """

    rank: int
    size: int
    in_model: bool
    kinds: dict[str, str]
    split: Split | None

    def __call__(self, grads: Arrays, metrics: Arrays) -> tuple[Arrays, Arrays, mx.array]:
        """Gradients and metrics of all processes, and the norm of the whole gradient (float32)."""
        ...

    def begin(self) -> None:
        """Begin, before the first computation of a step, what was left for it."""
        ...

    def extremes(self, metrics: Arrays) -> Arrays:
        """Of one micro-batch's metrics those that do not add up, over all processes."""
        ...


class Exchange:
    """Adds gradients and metrics up over all processes: one sum, with the metrics at the end of the gradients.

    An array above :data:`~hf_mlx.training.bundles.LARGEST` is summed alone, uncopied, and so is what has another dtype
    than float32, each dtype in itself; their order is that of the names, on every process.

    Args:
        world: The processes.
    """

    in_model = False

    def __init__(self, world: World) -> None:
        self.rank, self.size = world.rank, world.size
        self.kinds: dict[str, str] = {}
        self.split: Split | None = None
        self._group = world.group
        self.begin = world.begin

    def __call__(self, grads: Arrays, metrics: Arrays) -> tuple[Arrays, Arrays, mx.array]:
        """The sums over all processes, and the norm of the gradients.

        Args:
            grads: By the names of the bundles.
            metrics: float32 scalars. ``micro_batches`` is left alone, and :data:`OWN_LOSS` is added.
        """
        kept = {name: metrics[name] for name in _KEPT}
        kept[OWN_LOSS] = metrics["loss"] * self.size
        shared = [name for name in metrics if name not in _KEPT]
        lines: dict[mx.Dtype, list[str]] = {mx.float32: []}
        for name, grad in grads.items():
            if grad.size <= LARGEST:
                lines.setdefault(grad.dtype, []).append(name)
        after: list[mx.array] = []
        summed: Arrays = {}
        for dtype, names in lines.items():
            parts = [grads[name].reshape(-1) for name in names]
            if dtype == mx.float32:
                parts.append(mx.stack([*(metrics[name] for name in shared), mx.array(1.0)]))
            whole = self._sum(mx.concatenate(parts), after)
            at = 0
            for name in names:
                summed[name] = whole[at : at + grads[name].size].reshape(grads[name].shape)
                at += grads[name].size
            if dtype == mx.float32:
                kept |= {name: whole[at + place] for place, name in enumerate(shared)}
                # A ring that has just lost a process sums without an error, over what it has: not a number to log.
                kept["loss"] = mx.where(whole[at + len(shared)] == self.size, kept["loss"], math.nan)
        summed |= {name: self._sum(grad, after) for name, grad in grads.items() if name not in summed}
        made = {name: summed[name] for name in grads}
        return made, {name: kept[name] for name in (*metrics, OWN_LOSS)}, norm_of(map(square_sum, made.values()))

    def extremes(self, metrics: Arrays) -> Arrays:
        """:data:`~hf_mlx.training.scores.EXTREMES` over all processes: one exchange, where there are any."""
        signs = {name: sign for name, sign in EXTREMES.items() if name in metrics}
        if not signs:
            return {}
        line = mx.stack([sign * metrics[name] for name, sign in signs.items()])
        whole = mx.distributed.all_max(line, group=self._group)
        return {name: sign * whole[at] for at, (name, sign) in enumerate(signs.items())}

    def _sum(self, array: mx.array, after: list[mx.array]) -> mx.array:
        # One after the other: processes that exchange in unlike orders add up what does not belong together.
        if after:
            array = mx.depends(array, after)  # pyright: ignore[reportAssignmentType]
        summed = mx.distributed.all_sum(array, group=self._group)
        after[:] = [summed]
        return summed
