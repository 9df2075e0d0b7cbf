"""The ``greedy`` schedule, which also raises the learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from .contract import GROUPS, Schedule
from .plateau import MetricSchedule


class GreedySchedule(MetricSchedule):
    """``transformers.optimization.GreedyLR`` of transformers 5.23, its defaults included.

    It also raises the learning rate, up to ``max_lr``, after more than ``patience`` improvements in a row; waits
    ``warmup`` evaluations after that; averages the last ``window_size`` metrics if ``smooth``; and starts over
    after ``reset_start`` reductions that were wanted at ``min_lr``. ``verbose`` prints upstream and does nothing here.
    """

    def __init__(
        self,
        base_lr: float,
        mode: Literal["min", "max"] = "min",
        factor: float = 0.95,
        patience: int = 10,
        threshold: float = 1e-6,
        threshold_mode: Literal["rel", "abs"] = "abs",
        cooldown: int = 0,
        warmup: int = 0,
        min_lr: float = 1e-3,
        max_lr: float = 1.0,
        eps: float = 1e-8,
        verbose: bool = False,
        smooth: bool = False,
        window_size: int = 50,
        reset_start: int = 500,
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
        self.warmup, self.max_lr, self.verbose = warmup, max_lr, verbose
        self.smooth, self.window_size = smooth, window_size
        self.reset_start = self.reset_start_original = reset_start
        self.warmup_counter = 0
        self.num_good_epochs = 0
        self._init_lr = base_lr
        self._window: list[float] = []
        self._window_sum = 0.0

    def follow(self, earlier: Schedule) -> None:
        super().follow(earlier)
        self._init_lr = self._lr

    def step_metric(self, value: float) -> None:
        if self.smooth:
            value = self._average(value)
        self.last_epoch += 1
        if self.cooldown_counter > 0 or self.warmup_counter > 0:
            self._wait()
            return
        if self._improves(value):
            self.best = value
            self.num_bad_epochs, self.num_good_epochs = 0, self.num_good_epochs + 1
        else:
            self.num_bad_epochs, self.num_good_epochs = self.num_bad_epochs + 1, 0
        if self.num_good_epochs > self.patience:
            self._raise()
            self.warmup_counter = self.warmup
            self.num_good_epochs = 0
        elif self.num_bad_epochs > self.patience:
            self._reduce_or_reset()
            self.cooldown_counter = self.cooldown
            self.num_bad_epochs = 0

    def _wait(self) -> None:
        if self.cooldown_counter > 0:
            self.cooldown_counter -= 1
        else:
            self.warmup_counter -= 1
        self.num_bad_epochs = self.num_good_epochs = 0

    def _average(self, value: float) -> float:
        # A running sum, as upstream keeps it, rounding included.
        self._window.append(value)
        self._window_sum += value
        if len(self._window) > self.window_size:
            self._window_sum -= self._window.pop(0)
        return self._window_sum / len(self._window)

    def _raise(self) -> None:
        higher = min(self._lr / self.factor, self.max_lr)
        if higher - self._lr > self.eps:
            self._lr = higher
        self.reset_start = self.reset_start_original

    def _reduce_or_reset(self) -> None:
        self._reduce()
        if self._lr > self.min_lr:
            return
        self.reset_start -= 1
        if self.reset_start <= 0:
            self._lr = self._init_lr
            self.best = self._worst()
            self.num_bad_epochs = self.num_good_epochs = 0
            self.cooldown_counter = self.warmup_counter = 0
            self.reset_start = self.reset_start_original
            self._window, self._window_sum = [], 0.0

    def _state_dict(self) -> dict[str, Any]:
        own = ("warmup", "verbose", "smooth", "window_size", "reset_start", "reset_start_original")
        moving = ("warmup_counter", "num_good_epochs")
        return super()._state_dict() | {name: getattr(self, name) for name in (*own, *moving)}

    def state_dict(self, step: int) -> dict[str, Any]:
        state = self._state_dict()
        state |= {"max_lrs": [self.max_lr] * GROUPS, "_init_lrs": [self._init_lr] * GROUPS}
        if self.smooth:
            window = {"window_size": self.window_size, "values": list(self._window), "sum": self._window_sum}
            state["_streaming_avg"] = window
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.max_lr = state["max_lrs"][0]
        self._init_lr = float(state["_init_lrs"][0])
        window = state.get("_streaming_avg", {"values": [], "sum": 0.0})
        self._window, self._window_sum = list(window["values"]), window["sum"]
