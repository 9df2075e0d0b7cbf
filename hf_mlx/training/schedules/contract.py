"""What every schedule offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

# The Trainer always makes two parameter groups, with and without weight decay; scheduler states list both.
GROUPS = 2


class Schedule(ABC):
    """The learning rate as a function of the steps done, and its state as torch keeps it.

    Attributes:
        by_metric: True if :meth:`step_metric` has to be called after each evaluation.
    """

    by_metric = False

    @abstractmethod
    def lr(self, step: int) -> float:
        """Learning rate of the optimizer step that follows ``step`` finished ones: a double; ``lr(0)`` is the first."""

    def advance(self) -> None:  # noqa: B027
        """An optimizer step was made; only a schedule that keeps count itself has to know."""

    @abstractmethod
    def step_metric(self, value: float) -> None:
        """Take in the metric of an evaluation; a curve does not look at it."""

    @abstractmethod
    def state_dict(self, step: int) -> dict[str, Any]:
        """The content of ``scheduler.pt`` after ``step`` optimizer steps, as torch's scheduler writes it."""

    @abstractmethod
    def follow(self, earlier: Schedule) -> None:
        """Begin after ``earlier``, on the same optimizer: a second ``train()`` takes over what torch's groups hold."""

    @abstractmethod
    def take_rate(self, rate: float) -> None:
        """Hear of a rate that a script has set for a step; a curve goes on as before."""

    def describe_resumed(self) -> str | None:
        """What is to be said of the first step after :meth:`load_state_dict`; None when nothing is."""
        return None

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict`, or torch's scheduler of the same name, returned."""
