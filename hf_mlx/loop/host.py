"""What the loop asks of the trainer."""

from __future__ import annotations

from typing import Any, Protocol


class Host(Protocol):
    """What the loop asks of the trainer, so that a subclass may override any of it."""

    args: Any
    state: Any
    control: Any
    callback_handler: Any

    @property
    def model(self) -> Any: ...
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None: ...
    def evaluate(self, *, ignore_keys: list[str] | None = None) -> dict[str, float]: ...
    def save_checkpoint(self) -> None: ...
    def adopt_additions(self) -> None: ...


class Rates(Protocol):
    """The optimizer as callbacks see it, whose learning rate they may set."""

    def show(self, rate: float) -> None: ...
    def rate(self, scheduled: float) -> float: ...


class GradientLoan(Protocol):
    """Shows a step's gradients to callbacks that ask for them."""

    @property
    def are_wanted(self) -> bool: ...
    def lend(self, grads: dict[str, Any]) -> None: ...
    def take(self) -> dict[str, Any]: ...


def fire(host: Host, event: str) -> None:
    """Let the callbacks hear of ``event``; they may change the control."""
    host.control = getattr(host.callback_handler, event)(host.args, host.state, host.control)
