"""A torch schedule of the script's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .contract import Schedule


class HostSchedule(Schedule):
    """What ``torch.optim.lr_scheduler`` (or transformers) made, stepped when transformers steps it.

    Args:
        scheduler: The schedule.
        optimizer: The torch optimizer whose groups it sets.
    """

    def __init__(self, scheduler: Any, optimizer: Any) -> None:
        from torch.optim.lr_scheduler import ReduceLROnPlateau
        from transformers.optimization import GreedyLR

        self.scheduler, self.optimizer = scheduler, optimizer
        self.by_metric = isinstance(scheduler, (ReduceLROnPlateau, GreedyLR))

    def lr(self, step: int) -> float:
        # transformers 5.23 Trainer._get_learning_rate; another step than the next is nobody's to know.
        rate = self.optimizer.param_groups[0]["lr"] if self.by_metric else self.scheduler.get_last_lr()[0]
        return float(rate)

    def advance(self) -> None:
        if not self.by_metric:
            self.scheduler.step()

    def step_metric(self, value: float) -> None:
        self.scheduler.step(value)

    def follow(self, earlier: Schedule) -> None:
        pass

    def state_dict(self, step: int) -> dict[str, Any]:
        return self.scheduler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.scheduler.load_state_dict(dict(state))

    def take_rate(self, rate: float) -> None:
        """Nothing: a rate that is set in the optimizer is where both of them keep it."""
