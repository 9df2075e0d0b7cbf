"""The step in two halves, for a callback that looks at the gradients in between."""

from __future__ import annotations

import mlx.core as mx

from .clip import clip_whole
from .optimizers.contract import Arrays, State
from .step import Step, StepMetrics


class HandedStep:
    """Clips what a window has accumulated, and updates with it: together what :class:`Step` does at once.

    Args:
        step: Holds the accumulated window as its carry, and is brought on.
    """

    def __init__(self, step: Step) -> None:
        self._step = step
        self._clipped = mx.compile(self._clip)
        self._updated = mx.compile(self._update)
        self._sums: Arrays = {}

    def collect(self) -> Arrays:
        """The window's gradients by MLX name, clipped, as torch's are before ``optimizer.step()``."""
        assert self._step.carry is not None
        grads, sums = self._step.collect(self._step.carry)
        grads, norm = self._clipped(grads)
        self._sums = {**sums, "grad_norm": norm}
        return grads

    def apply(self, grads: Arrays, number: int, lr: float) -> StepMetrics:
        """Update with ``grads``; the window is done.

        Args:
            grads: Of :meth:`collect`, or what was made of them.
            number: Optimizer steps including this one.
            lr: Learning rate.
        """
        step = self._step
        hyper = {key: mx.array(value, mx.float32) for key, value in step.optimizer.hyper(number, lr).items()}
        if step.optimizer.on_host:
            # The optimizer moves for good, so what can fail must have been computed by then.
            mx.eval(grads, self._sums)
            params, state = step.optimizer.step_on_host(step.params, grads), step.state
        else:
            params, state = self._updated(step.params, grads, step.state, hyper)
        step.carry = None
        step.load(params, state)
        mx.async_eval(params, state, self._sums)
        return StepMetrics.split(self._sums)

    def _clip(self, grads: Arrays) -> tuple[Arrays, mx.array]:
        return clip_whole(grads, self._step.clip)

    def _update(self, params: Arrays, grads: Arrays, state: State, hyper: Arrays) -> tuple[Arrays, State]:
        return self._step.optimizer.update(params, grads, state, hyper)
