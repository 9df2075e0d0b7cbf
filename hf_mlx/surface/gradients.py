"""``p.grad`` for callbacks that listen to ``on_pre_optimizer_step``, on the model that they see."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..errors import TrainingError
from ..models.torch_arrays import to_mlx
from .writes import differs, may_look

EVENT = "on_pre_optimizer_step"


class Gradients:
    """Lends a step's gradients to the model's parameters, where a callback asks for them.

    Args:
        base: Has the parameters.
        handler: ``transformers.CallbackHandler``.
    """

    def __init__(self, base: Any, handler: Any) -> None:
        self._base = base
        self._handler = handler

    @property
    def are_wanted(self) -> bool:
        """Whether a callback listens to the event before the update."""
        return any(may_look(type(callback), EVENT) for callback in self._handler.callbacks)

    def lend(self, grads: dict[str, mx.array]) -> None:
        """Let ``p.grad`` be these, by MLX name."""
        self._base.lend_gradients(grads)

    def take(self) -> dict[str, mx.array]:
        """End the loan.

        Returns:
            By MLX name, what a callback has written.

        Raises:
            TrainingError: A gradient was taken away.
        """
        return self._base.take_gradients()


def read_written(name: str, parameter: Any, lent: mx.array) -> mx.array | None:
    """What a callback has made of ``parameter.grad``; None where it is as it was lent.

    Raises:
        TrainingError: It is None.
    """
    if parameter.grad is None:
        raise TrainingError(
            f"{name}.grad = None in {EVENT}",
            "a gradient for every trained parameter",
            f"p.grad.zero_(), or freeze {name} before the trainer is made",
        )
    return to_mlx(parameter.grad) if differs(parameter.grad, lent) else None
