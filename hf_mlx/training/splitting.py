"""Micro-batches computed in pieces of rows, so that a step fits in memory and its numbers stay what they are.

transformers' ``auto_find_batch_size`` starts the run again with a smaller batch, and so with another curve. Here batch,
window and sampler stay as they were written: a micro-batch that does not fit is cut into 2, 4, 8, … pieces, whose
gradients add up under the denominators of the whole.
"""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from ..settings.plan import TrainPlan
from .inputs import Inputs, gather_scored
from .loss import IGNORED
from .measured import StepMetrics
from .memory import estimate_step, planned_limit, show_bytes
from .shortage import is_shortage
from .step import Arrays, Step, keep_whole

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# Arrays that are made anew for a piece, or that no piece needs.
_REMADE = ("targets", "positions", "lengths")


class Splitting:
    """Runs the windows of a step in pieces that fit.

    Before a shape is first computed its need is estimated; where the device runs out of memory all the same, the step
    is undone, the pieces are halved from there on, and the step is computed again.

    Args:
        step: Its ``cut`` is set.
        need: Bytes that a micro-batch of so many rows and tokens takes, all else that a step holds included.
        limit: Bytes there are.

    Attributes:
        most: Positions (rows x tokens) of a piece, as far as more of them ran out of memory; None while none did.
    """

    def __init__(self, step: Step, need: Callable[[int, int], float], limit: float) -> None:
        self.step = step
        self.most: int | None = None
        self._need, self._limit = need, limit
        self._estimated: dict[tuple[int, int], int] = {}
        self._proven: set[tuple[Any, ...]] = set()
        step.cut = self.cut

    def __call__(self, window: Sequence[Inputs], step: int, lr: float) -> StepMetrics:
        """As :meth:`Step.__call__ <hf_mlx.training.step.Step.__call__>`."""
        return self._compute(window, lambda: self.step(window, step, lr))

    def accumulate(self, window: Sequence[Inputs], count: int) -> None:
        """As :meth:`Step.accumulate <hf_mlx.training.step.Step.accumulate>`."""
        self._compute(window[:count], lambda: self.step.accumulate(window, count))

    def cut(self, micro: Inputs) -> Sequence[Arrays]:
        """``micro`` in as many pieces as it takes."""
        shape = self._shape(micro)
        return split_arrays(micro.arrays, self.count_pieces(*shape), shape[2])

    def count_pieces(self, rows: int, tokens: int, unit: int = 1) -> int:
        """Into how many pieces ``rows`` x ``tokens`` are cut: a power of two, or one for each ``unit`` of rows."""
        known = self._estimated.get((rows, tokens))
        if known is None:
            known = halve(rows // unit, lambda most: self._need(unit * most, tokens) <= self._limit)
            self._estimated[rows, tokens] = known
            if known > 1:
                logger.warning(
                    f"auto_find_batch_size: a micro-batch of {rows} x {tokens} tokens is estimated at "
                    f"{show_bytes(self._need(rows, tokens))} of {show_bytes(self._limit)}; it is computed in {known} "
                    "pieces, and no number changes."
                )
        if self.most is None:
            return known
        return max(known, halve(rows // unit, lambda most: unit * most * tokens <= (self.most or 0)))

    def _compute(self, window: Sequence[Inputs], run: Callable[[], Result]) -> Result:
        held = self.step.hold()
        while True:
            pieces = [(*self._shape(micro), self.count_pieces(*self._shape(micro))) for micro in window]
            try:
                return self._attempt(run, tuple(pieces))
            except (RuntimeError, MemoryError) as error:
                sizes = ((unit * math.ceil(rows / unit / count), tokens, unit) for rows, tokens, unit, count in pieces)
                rows, tokens, unit = max(sizes, key=lambda size: size[0] * size[1])
                if rows <= unit or held.taken or not is_shortage(error):
                    raise
                cause = str(error)
            # Outside of the handler, whose traceback keeps the arrays of the failed attempt.
            self.step.restore(held)
            gc.collect()
            mx.synchronize()
            mx.clear_cache()
            self.most = math.ceil(rows / 2) * tokens
            logger.warning(
                f"auto_find_batch_size: MLX ran out of memory on {rows} rows x {tokens} tokens ({cause}). The step is "
                f"done again with at most {self.most} positions at once, and so is what follows; no number changes."
            )

    def _shape(self, micro: Inputs) -> tuple[int, int, int]:
        rows, tokens = micro.arrays["input_ids"].shape
        return rows, tokens, self.step.objective.rows_together(micro.arrays)

    def _attempt(self, run: Callable[[], Result], pieces: tuple[Any, ...]) -> Result:
        result = run()
        if pieces not in self._proven:
            # MLX may run out of memory later than it is called: the first time of each shape is waited for.
            mx.eval(self.step.params, self.step.state, self.step.carry or ())
            self._proven.add(pieces)
        return result


def choose_computation(step: Step, plan: TrainPlan, config: Any) -> Step | Splitting:
    """The step as it is, or in pieces that fit where ``auto_find_batch_size`` asks for it.

    Args:
        step: Its micro-batches are whole again, or cut as the result says.
        plan: Of the run.
        config: The model's, as transformers has it.
    """
    step.cut = keep_whole
    if not plan.auto_find_batch_size:
        return step
    if step.objective.whole and step.objective.routers is None:
        logger.warning(
            "auto_find_batch_size: this loss looks at all pairs of a micro-batch at once, which is computed whole."
        )
        return step
    if not step.divisible:
        logger.warning(
            "auto_find_batch_size: micro-batches are computed whole, since the loss is the script's own and may be "
            "anything of all its rows; per_device_train_batch_size= is what has to fit."
        )
        return step
    if step.objective.routers is not None:
        logger.warning(
            "auto_find_batch_size: micro-batches of this model are computed whole, since the load of its experts is "
            "balanced over each of them; router_aux_loss_coef=0.0, or output_router_logits=False in the config of a "
            "model for Trainer, lets them be computed in pieces."
        )
        return step
    return Splitting(step, lambda rows, tokens: estimate_step(step, plan, config, rows, tokens).total, planned_limit())


def halve(rows: int, fits: Callable[[int], bool]) -> int:
    """The fewest pieces, of 1, 2, 4, … and ``rows``, whose largest fits; ``rows`` where none does."""
    pieces = 1
    while pieces < rows and not fits(math.ceil(rows / pieces)):
        pieces = min(2 * pieces, rows)
    return pieces


def split_arrays(arrays: Arrays, pieces: int, unit: int = 1) -> Sequence[Arrays]:
    """The arrays of a micro-batch as ``pieces`` runs of its rows, of equal size but for ``unit``, as wide as the whole.

    ``lengths`` is left out: only routers read it, whose balance is one of the whole micro-batch.
    """
    if pieces == 1:
        return (arrays,)
    targets = scatter_targets(arrays)
    by_row = {k: np.array(v) for k, v in arrays.items() if k not in _REMADE and v.ndim > 1}
    whole = {k: v for k, v in arrays.items() if v.ndim == 0}
    units = np.array_split(np.arange(len(targets) // unit), pieces)
    parts = [slice(unit * int(part[0]), unit * (int(part[-1]) + 1)) for part in units]
    made = ({k: v[part] for k, v in by_row.items()} | gather_scored(targets[part]) for part in parts)
    return [{k: mx.array(v) for k, v in piece.items()} | whole for piece in made]


def scatter_targets(arrays: Arrays) -> np.ndarray:
    """The next token of every position or -100, (R, W) int32, of :attr:`~hf_mlx.training.inputs.Inputs.arrays`."""
    targets = np.array(arrays["targets"])
    if "positions" in arrays:
        scored, positions = targets != IGNORED, np.array(arrays["positions"])
        gathered = targets[scored]
        targets = np.full(arrays["input_ids"].size, IGNORED, np.int32)
        targets[positions[scored]] = gathered
    return targets.reshape(arrays["input_ids"].shape)
