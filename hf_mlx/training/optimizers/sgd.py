"""Stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from ...errors import SettingError
from ...settings.plan import OptimPlan
from .contract import Arrays, Optimizer


class SGD(Optimizer):
    """``torch.optim.SGD`` of torch 2.13: plain unless ``optim_args`` sets momentum, dampening or nesterov.

    Raises:
        SettingError: nesterov without momentum, or with dampening.
    """

    defaults: Mapping[str, float | bool] = {"momentum": 0.0, "dampening": 0.0, "nesterov": False}

    def __init__(self, plan: OptimPlan, decay: frozenset[str]) -> None:
        super().__init__(plan, decay)
        options = self.options
        if options["nesterov"] and (options["momentum"] == 0 or options["dampening"] != 0):
            raise SettingError(
                f"optim_args with nesterov, momentum={options['momentum']:g} and dampening={options['dampening']:g}",
                "nesterov needs a momentum and no dampening",
                'optim_args="momentum=0.9,nesterov=true"',
            )

    def slots(self, param: mx.array) -> Mapping[str, tuple[int, ...]]:
        return {"momentum_buffer": param.shape} if self.options["momentum"] else {}

    def hyper(self, step: int, lr: float) -> dict[str, float]:
        # The first gradient enters the buffer whole.
        return {"lr": lr, "intake": 1.0 if step == 1 else 1 - self.options["dampening"]}

    def apply(
        self, param: mx.array, grad: mx.array, state: Arrays, hyper: Mapping[str, mx.array], weight_decay: float
    ) -> tuple[mx.array, Arrays]:
        if weight_decay:
            grad = grad + weight_decay * param
        if not self.options["momentum"]:
            return param - hyper["lr"] * grad, {}
        momentum = self.options["momentum"]
        buffer = momentum * state["momentum_buffer"] + hyper["intake"] * grad
        grad = grad + momentum * buffer if self.options["nesterov"] else buffer
        return param - hyper["lr"] * grad, {"momentum_buffer": buffer}
