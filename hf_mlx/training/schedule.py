"""The learning rate of every step: a fixed curve, or one that follows the evaluation metric."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..errors import SettingError
from ..settings.plan import OptimPlan, SchedulePlan
from .schedules.contract import GROUPS, Schedule
from .schedules.curves import CURVES
from .schedules.greedy import GreedySchedule
from .schedules.plateau import PlateauSchedule

_BY_METRIC = {"reduce_lr_on_plateau": PlateauSchedule, "greedy": GreedySchedule}


class CurveSchedule(Schedule):
    """``torch.optim.lr_scheduler.LambdaLR`` over one of :data:`~hf_mlx.training.schedules.curves.CURVES`."""

    def __init__(self, plan: SchedulePlan, base_lr: float, total_steps: int) -> None:
        self.name = plan.name
        self.base_lr = base_lr
        self._stored: tuple[int, float] | None = None
        self._factor = CURVES[plan.name](count_warmup(plan, total_steps), total_steps, base_lr, **plan.options)

    def lr(self, step: int) -> float:
        # torch computes a rate when the step before it ends, so a resumed run's first rate is the stored one.
        if self._stored is not None and step == self._stored[0]:
            return self._stored[1]
        return self.base_lr * self._factor(step)

    def follow(self, earlier: Schedule) -> None:
        # torch's groups keep the initial_lr of the first schedule.
        if isinstance(earlier, CurveSchedule):
            self.base_lr = earlier.base_lr

    def take_rate(self, rate: float) -> None:
        pass

    def describe_resumed(self) -> str | None:
        if self._stored is None:
            return None
        step, rate = self._stored
        curve = self.base_lr * self._factor(step)
        if math.isclose(rate, curve, rel_tol=1e-9, abs_tol=1e-15):
            return None
        return (
            f"The schedule changed since the checkpoint: the first step still has its learning rate, {rate:g} "
            f"(the schedule of this run has {curve:g} there), and from the second on this run's holds, "
            "here as in transformers."
        )

    def step_metric(self, value: float) -> None:
        pass

    def state_dict(self, step: int) -> dict[str, Any]:
        return {
            "base_lrs": [self.base_lr] * GROUPS,
            "last_epoch": step,
            "_step_count": step + 1,
            "_is_initial": False,
            "_get_lr_called_within_step": False,
            "_last_lr": [self.lr(step)] * GROUPS,
            # torch stores the attributes of callables that are not plain functions: none, for a partial.
            "lr_lambdas": [None if self.name == "constant" else {}] * GROUPS,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        # As in torch the checkpoint's base learning rate wins over the one in the arguments.
        self.base_lr = float(state["base_lrs"][0])
        self._stored = int(state["last_epoch"]), float(state["_last_lr"][0])


def count_warmup(plan: SchedulePlan, total_steps: int) -> int:
    """Warmup in optimizer steps: ``TrainingArguments.get_warmup_steps`` of transformers 5.23."""
    if plan.warmup_steps >= 1:
        return int(plan.warmup_steps)
    return math.ceil(total_steps * plan.warmup_steps)


def make_schedule(plan: SchedulePlan, optim: OptimPlan, total_steps: int) -> Schedule:
    """The schedule that ``plan`` names, starting from ``optim.learning_rate``.

    Args:
        plan: An ``lr_scheduler_type`` of transformers with its ``lr_scheduler_kwargs`` and warmup.
        optim: Gives the base learning rate.
        total_steps: Optimizer steps of the whole run.

    Raises:
        SettingError: The name is unknown, or an option is missing, unknown or contradicts the learning rate.
    """
    if plan.name not in CURVES and plan.name not in _BY_METRIC:
        names = ", ".join([*CURVES, *_BY_METRIC])
        raise SettingError(f"lr_scheduler_type={plan.name!r}", f"one of {names}", 'lr_scheduler_type="linear"')
    try:
        if plan.name in _BY_METRIC:
            return _BY_METRIC[plan.name](optim.learning_rate, **plan.options)
        return CurveSchedule(plan, optim.learning_rate, total_steps)
    except TypeError as error:
        raise SettingError(
            f"lr_scheduler_type={plan.name!r} with lr_scheduler_kwargs={dict(plan.options)!r}",
            f"the options that this schedule reads ({error})",
            'lr_scheduler_kwargs=None, or lr_scheduler_type="linear"',
        ) from error


def lr_at(step: int, base_lr: float, plan: SchedulePlan, total_steps: int) -> float:
    """Learning rate of the optimizer step after ``step`` finished ones; for the metric schedules the first one's."""
    return make_schedule(plan, OptimPlan(learning_rate=base_lr), total_steps).lr(step)
