"""Lion."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from .contract import Arrays, Optimizer


class Lion(Optimizer):
    """bitsandbytes' 32-bit Lion (``kOptimizer32bit1State``, LION) with ``adam_beta1`` and ``adam_beta2``.

    The state is float32 under bitsandbytes' name, ``state1``, whatever the parameter's dtype.
    """

    def slots(self, param: mx.array) -> Mapping[str, tuple[int, ...]]:
        return {"state1": param.shape}

    def state_dtype(self, param: mx.array) -> mx.Dtype:
        return mx.float32

    def hyper(self, step: int, lr: float) -> dict[str, float]:
        return {"lr": lr, "decay": 1 - lr * self.plan.weight_decay}

    def apply(
        self, param: mx.array, grad: mx.array, state: Arrays, hyper: Mapping[str, mx.array], weight_decay: float
    ) -> tuple[mx.array, Arrays]:
        beta1, beta2 = self.plan.adam_beta1, self.plan.adam_beta2
        if weight_decay:
            param = param * hyper["decay"]
        mean = state["state1"]
        direction = mx.sign(beta1 * mean + (1 - beta1) * grad)
        return param - hyper["lr"] * direction, {"state1": beta2 * mean + (1 - beta2) * grad}
