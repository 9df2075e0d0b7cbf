"""Steps whose values nobody has read yet: the device is never waited for between two steps."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx

from ..errors import TrainingError
from ..processes.world import World
from ..session import Session
from ..training.inputs import Inputs
from ..training.measured import StepMetrics
from ..training.step import read_scalar
from ..training.undefined import settle_undefined


class Pending:
    """The steps since the last log entry.

    Args:
        session: Its running means are fed, its step's carry is taken.
        last_logged: Step of the last log entry.
        lr: The learning rate of a step (counted from 1), for messages.

    Attributes:
        last_logged: Step of the last log entry of the training loss.
        total_loss: Sum over the steps of this call, as far as they were read.
    """

    def __init__(self, session: Session, last_logged: int, lr: Callable[[int], float]) -> None:
        self.last_logged = last_logged
        self.total_loss = self._unfinite = 0.0
        self._session = session
        self._lr = lr
        self._steps: list[StepMetrics] = []
        self._checked = 0
        self._warned = False

    def resume(self, steps: Sequence[Mapping[str, float]], last_logged: int) -> None:
        """Go on with the steps of an earlier call that were not logged yet."""
        self.last_logged = last_logged
        self._steps = [StepMetrics.split({name: mx.array(step[name]) for name in step}) for step in steps]
        self._checked = len(self._steps)
        # The mean loss of this call leaves out what an earlier one trained.
        self.total_loss = -sum(step["loss"] for step in steps)

    def append(self, metrics: StepMetrics, window: Sequence[Inputs]) -> None:
        """Take the step of ``window``, which was just begun, and look at the one before it.

        Raises:
            TrainingError: The loss of that one is not finite.
        """
        plan, step = self._session.plan, self._session.step
        metrics = settle_undefined(metrics, window, step, self._steps, filtered=plan.nan_inf_filter)
        self.check()
        self._steps.append(metrics)

    def check(self) -> None:
        """Look at the losses that were not looked at yet; say at once which one is not finite.

        Raises:
            TrainingError: One of them, while ``logging_nan_inf_filter`` is on.
        """
        for metrics in self._steps[self._checked :]:
            step = self.last_logged + self._checked + 1
            self._checked += 1
            with self._session.world.waiting(f"step {step}"):
                loss = read_scalar(metrics.loss)
            if math.isfinite(loss):
                continue
            watch = self._session.world.watch
            if watch is not None and not self._warned and watch.name_ended() is not None:
                raise self._session.world.lost(f"step {step}")
            if not self._session.plan.nan_inf_filter:
                if not self._warned:
                    self._warned = True
                    warnings.warn(
                        f"the loss is {loss} at step {step}; it is logged as it is from here on", stacklevel=2
                    )
                continue
            self._steps.clear()
            raise TrainingError(
                f"a loss of {loss} at step {step} (learning_rate={self._lr(step):g})",
                "the loss of every step is finite; from here on every weight would be NaN",
                "lower learning_rate, set max_grad_norm=1.0, or look at the batch of that step; "
                "logging_nan_inf_filter=False goes on and logs the value as it is",
            )

    @property
    def grad_norm(self) -> mx.array | None:
        """Of the last step; None where no update was made."""
        return self._steps[-1].grad_norm

    def drain(self, *, own: bool = False) -> float:
        """Sum and forget the losses, those of an unfinished window too; feeds the running metrics.

        Args:
            own: Of several processes add up what this one alone sees, as transformers 5.23
                ``Trainer._inner_training_loop`` does with the steps after the last log.
        """
        # Something to do for the device while values are read and logged.
        self._session.step.begin_update()
        carried = self._session.step.take_carried()
        if carried is not None:
            self._steps.append(sum_metrics(carried, self._session.world.sharing))
        self.check()
        losses = [m.own_loss if own and m.own_loss is not None else m.loss for m in self._steps]
        total = self._unfinite + sum(read_scalar(loss) for loss in losses)
        # Upstream sets its sum back by taking it from itself, so what is not finite stays in every later entry.
        self._unfinite = total - total
        means = self._session.progress.means
        for metrics in self._steps:
            measured = {name: read_scalar(metrics.metrics[name]) for name in self._session.step.objective.metrics}
            means.add(measured, int(read_scalar(metrics.micro_batches)))
        self._steps.clear()
        self._checked = 0
        self.total_loss += total
        return total

    def to_dicts(self) -> list[dict[str, Any]]:
        """What :meth:`resume` takes; the scalars may be lazy."""
        return [
            {"loss": m.loss, "grad_norm": m.grad_norm, "micro_batches": m.micro_batches, **m.metrics}
            | ({} if m.own_loss is None else {"own_loss": m.own_loss})
            for m in self._steps
        ]


def sum_metrics(metrics: StepMetrics, world: World) -> StepMetrics:
    """Of a window that no update has ended, what all processes measured together."""
    if world.is_alone:
        return metrics
    sums = world.sum({"loss": metrics.loss, **metrics.metrics}, "the metrics of an unfinished step")
    own = metrics.loss * world.size
    return StepMetrics(sums.pop("loss"), metrics.grad_norm, metrics.micro_batches, sums, own)
