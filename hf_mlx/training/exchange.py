"""The sum of a window's gradients over all processes, inside the compiled step."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from ..processes.world import World
from .bundles import LARGEST
from .optimizers.contract import Arrays

# Each process counts its own.
_KEPT = ("micro_batches",)
#: By name among the metrics of a step: the loss as this process alone sees it, as it is under torch's DDP.
OWN_LOSS = "own_loss"


class Exchange:
    """Adds gradients and metrics up over all processes: one sum, with the metrics at the end of the gradients.

    An array above :data:`~hf_mlx.training.bundles.LARGEST` is summed alone, uncopied, and so is what has another dtype
    than float32, each dtype in itself; their order is that of the names, on every process.

    Args:
        world: The processes.
    """

    def __init__(self, world: World) -> None:
        self.rank, self.size = world.rank, world.size
        self._group = world.group

    def __call__(self, grads: Mapping[str, mx.array], metrics: Mapping[str, mx.array]) -> tuple[Arrays, Arrays]:
        """The sums over all processes.

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
                parts.append(mx.stack([metrics[name] for name in shared]))
            whole = self._sum(mx.concatenate(parts), after)
            at = 0
            for name in names:
                summed[name] = whole[at : at + grads[name].size].reshape(grads[name].shape)
                at += grads[name].size
            if dtype == mx.float32:
                kept |= {name: whole[at + place] for place, name in enumerate(shared)}
        summed |= {name: self._sum(grad, after) for name, grad in grads.items() if name not in summed}
        return {name: summed[name] for name in grads}, {name: kept[name] for name in (*metrics, OWN_LOSS)}

    def _sum(self, array: mx.array, after: list[mx.array]) -> mx.array:
        # One after the other: processes that exchange in unlike orders add up what does not belong together.
        if after:
            array = mx.depends(array, after)  # pyright: ignore[reportAssignmentType]
        summed = mx.distributed.all_sum(array, group=self._group)
        after[:] = [summed]
        return summed
