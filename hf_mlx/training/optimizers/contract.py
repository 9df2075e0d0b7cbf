"""What every optimizer offers: a pure update over flat dicts of arrays."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Any

import mlx.core as mx

from ...errors import SettingError
from ...settings.plan import OptimPlan

Arrays = dict[str, mx.array]
# {state name as torch spells it: {parameter name: array}}
State = dict[str, Arrays]


class Optimizer(ABC):
    """An update rule without state of its own.

    All arithmetic is float32 and the result is rounded once to the dtype it is stored in: for float32 parameters
    that is torch's arithmetic, for bfloat16 ones that of torch's fused kernels. Numbers that change from step to step
    come from :meth:`hyper` as Python doubles and enter :meth:`update` as arrays, so a compiled step is traced once
    and no bias correction is rounded on the way.

    Args:
        plan: Weight decay, betas and epsilon; ``plan.options`` holds the parsed ``optim_args``.
        decay: Names of the parameters that weight decay applies to; the others have none.

    Raises:
        SettingError: ``plan.options`` has a key that this optimizer does not read, or a negative number.
    """

    #: What ``plan.options`` may hold, with torch's defaults.
    defaults: Mapping[str, Any] = {}
    #: Whether each element is updated by itself, so that arrays may be updated end to end.
    elementwise: bool = True
    #: Whether it is an object of the script's, which :meth:`step_on_host` calls between two compiled functions.
    on_host: bool = False

    def __init__(self, plan: OptimPlan, decay: frozenset[str]) -> None:
        self.plan = plan
        self.decay = decay
        self.options = {**self.defaults, **plan.options}
        unknown = sorted(set(plan.options) - set(self.defaults))
        negative = sorted(key for key, value in plan.options.items() if value < 0)
        if unknown or negative:
            raise SettingError(
                f"optim_args with {', '.join(unknown or negative)} for {plan.name}",
                f"numbers >= 0 under keys that it reads: {', '.join(self.defaults) or 'none'}",
                "optim_args=None",
            )

    @abstractmethod
    def slots(self, param: mx.array) -> Mapping[str, tuple[int, ...]]:
        """The state arrays of one parameter: {torch's name: shape}."""

    @abstractmethod
    def hyper(self, step: int, lr: float) -> dict[str, float]:
        """The numbers of one step, as doubles.

        Args:
            step: Optimizer steps including this one; counts from 1.
            lr: Learning rate of this step.
        """

    @abstractmethod
    def apply(
        self, param: mx.array, grad: mx.array, state: Arrays, hyper: Mapping[str, mx.array], weight_decay: float
    ) -> tuple[mx.array, Arrays]:
        """Update one parameter; everything comes and goes in float32, ``state`` under the keys of :meth:`slots`."""

    def step_on_host(self, params: Arrays, grads: Arrays) -> Arrays:
        """One step outside of the compiled functions; clipped ``grads`` in, the new parameters out."""
        raise NotImplementedError

    def forget_host(self) -> None:  # noqa: B027
        """Other parameters than the last step's result are being trained from here on."""

    def state_dtype(self, param: mx.array) -> mx.Dtype:
        """Dtype in which the state of ``param`` is kept: the parameter's own, as torch does."""
        return param.dtype

    def init(self, params: Mapping[str, mx.array]) -> State:
        """Zero state for ``params``: {torch's state name: {parameter name: array}}."""
        state: State = {}
        for name, param in params.items():
            for slot, shape in self.slots(param).items():
                state.setdefault(slot, {})[name] = mx.zeros(shape, dtype=self.state_dtype(param))
        return state

    def update(
        self,
        params: Mapping[str, mx.array],
        grads: Mapping[str, mx.array],
        state: State,
        hyper: Mapping[str, mx.array],
        scale: mx.array | None = None,
    ) -> tuple[Arrays, State]:
        """One step for all parameters; pure, so ``mx.compile`` can trace it.

        Args:
            params: {name: array}, any float dtype.
            grads: Gradients under the same names.
            state: What :meth:`init` or the last update returned.
            hyper: :meth:`hyper` as float32 scalars.
            scale: Float32 factor on every gradient (the clip), or None.

        Returns:
            New parameters and new state, in the dtypes that came in.
        """
        new_params: Arrays = {}
        new_state: State = {slot: {} for slot in state}
        for name, param in params.items():
            grad = grads[name]
            if scale is not None:
                # torch clips in place, so a bfloat16 gradient is rounded again.
                grad = (grad * scale).astype(grad.dtype)
            grad = grad.astype(mx.float32)
            old = {slot: arrays[name] for slot, arrays in state.items() if name in arrays}
            wide = {slot: array.astype(mx.float32) for slot, array in old.items()}
            weight_decay = self.plan.weight_decay if name in self.decay else 0.0
            updated, moved = self.apply(param.astype(mx.float32), grad, wide, hyper, weight_decay)
            for slot, array in moved.items():
                new_state[slot][name] = array.astype(old[slot].dtype)
            new_params[name] = _together(updated.astype(param.dtype), [new_state[slot][name] for slot in moved])
        return new_params, new_state


def _together(param: mx.array, states: Iterable[mx.array]) -> mx.array:
    """``param``, as the last result of a kernel that gives ``states`` too.

    They share almost all of an update. The compiler fuses what one result is made of, and makes other results of the
    function outputs of that kernel; alone, what they share would be written in float32 and read again. One choice for
    all states: the compiler leaves a condition that two choices share outside, as an array that no result can replace.
    """
    alike = [state for state in states if state.shape == param.shape]
    if not alike:
        return param
    return mx.where(mx.array(True), param, reduce(mx.maximum, alike)).astype(param.dtype)
