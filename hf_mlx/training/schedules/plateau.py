"""Schedules that follow the evaluation metric: what they share, and ``reduce_lr_on_plateau``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from ...errors import SettingError
from .contract import GROUPS, Schedule


class MetricSchedule(Schedule):
    """What both share: the learning rate is a state, moved by :meth:`step_metric` after each evaluation.

    Args:
        base_lr: Learning rate to start from.
        mode: Whether a smaller ("min") or larger ("max") metric is better.
        factor: What a reduction multiplies by; below 1.
        patience: Evaluations without improvement that are tolerated.
        threshold: What counts as an improvement, relative to the best or absolute.
        cooldown: Evaluations after a reduction in which nothing is counted.
        min_lr: Lower bound.
        eps: Smaller changes of the learning rate are not made.
    """

    by_metric = True

    def __init__(
        self,
        base_lr: float,
        *,
        mode: Literal["min", "max"],
        factor: float,
        patience: int,
        threshold: float,
        threshold_mode: Literal["rel", "abs"],
        cooldown: int,
        min_lr: float,
        eps: float,
    ) -> None:
        if factor >= 1.0:
            raise SettingError(
                f'lr_scheduler_kwargs={{"factor": {factor}}}', "a factor below 1", 'lr_scheduler_kwargs={"factor": 0.1}'
            )
        self._lr = base_lr
        self.mode, self.threshold, self.threshold_mode = mode, threshold, threshold_mode
        self.factor, self.patience, self.cooldown, self.eps = factor, patience, cooldown, eps
        self.min_lr = min_lr
        self.last_epoch = 0
        self.best = self._worst()
        self.num_bad_epochs = 0
        self.cooldown_counter = 0

    def lr(self, step: int) -> float:
        return self._lr

    def take_rate(self, rate: float) -> None:
        # torch's goes on from the rate that it finds in the optimizer's groups.
        self._lr = rate

    def follow(self, earlier: Schedule) -> None:
        self._lr = earlier.lr(0)

    def _worst(self) -> float:
        return math.inf if self.mode == "min" else -math.inf

    def _improves(self, value: float) -> bool:
        if self.threshold_mode == "rel":
            margin = 1.0 - self.threshold if self.mode == "min" else 1.0 + self.threshold
            return value < self.best * margin if self.mode == "min" else value > self.best * margin
        return value < self.best - self.threshold if self.mode == "min" else value > self.best + self.threshold

    def _reduce(self) -> None:
        lower = max(self._lr * self.factor, self.min_lr)
        if self._lr - lower > self.eps:
            self._lr = lower

    def _state_dict(self) -> dict[str, Any]:
        shared = ("mode", "threshold", "threshold_mode", "factor", "patience", "cooldown", "eps")
        moving = ("last_epoch", "best", "num_bad_epochs", "cooldown_counter")
        state = {name: getattr(self, name) for name in (*shared, *moving)}
        return state | {"min_lrs": [self.min_lr] * GROUPS, "_last_lr": [self._lr] * GROUPS}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        # torch's load replaces every attribute, the options included.
        for name in self._state_dict().keys() - {"min_lrs", "_last_lr"}:
            setattr(self, name, state[name])
        self.min_lr = state["min_lrs"][0]
        self._lr = float(state["_last_lr"][0])


class PlateauSchedule(MetricSchedule):
    """``torch.optim.lr_scheduler.ReduceLROnPlateau`` of torch 2.13, its defaults included."""

    def __init__(
        self,
        base_lr: float,
        mode: Literal["min", "max"] = "min",
        factor: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        threshold_mode: Literal["rel", "abs"] = "rel",
        cooldown: int = 0,
        min_lr: float = 0,
        eps: float = 1e-8,
    ) -> None:
        super().__init__(
            base_lr,
            mode=mode,
            factor=factor,
            patience=patience,
            threshold=threshold,
            threshold_mode=threshold_mode,
            cooldown=cooldown,
            min_lr=min_lr,
            eps=eps,
        )

    def step_metric(self, value: float) -> None:
        self.last_epoch += 1
        if self._improves(value):
            self.best = value
            self.num_bad_epochs = 0
        else:
            self.num_bad_epochs += 1
        if self.cooldown_counter > 0:
            self.cooldown_counter -= 1
            self.num_bad_epochs = 0
        if self.num_bad_epochs > self.patience:
            self._reduce()
            self.cooldown_counter = self.cooldown
            self.num_bad_epochs = 0

    def state_dict(self, step: int) -> dict[str, Any]:
        return self._state_dict() | {"default_min_lr": self.min_lr, "mode_worse": self._worst()}
