"""AdamW with bias correction and decoupled weight decay."""

from __future__ import annotations

import math
from collections.abc import Mapping

import mlx.core as mx

from .contract import Arrays, Optimizer


class AdamW(Optimizer):
    """``torch.optim.AdamW`` of torch 2.13, in the order of operations of ``_single_tensor_adam``."""

    def slots(self, param: mx.array) -> Mapping[str, tuple[int, ...]]:
        return {"exp_avg": param.shape, "exp_avg_sq": param.shape}

    def hyper(self, step: int, lr: float) -> dict[str, float]:
        return {
            "decay": 1 - lr * self.plan.weight_decay,
            "step_size": lr / (1 - self.plan.adam_beta1**step),
            "correction": math.sqrt(1 - self.plan.adam_beta2**step),
        }

    def apply(
        self, param: mx.array, grad: mx.array, state: Arrays, hyper: Mapping[str, mx.array], weight_decay: float
    ) -> tuple[mx.array, Arrays]:
        beta1, beta2 = self.plan.adam_beta1, self.plan.adam_beta2
        if weight_decay:
            param = param * hyper["decay"]
        mean = state["exp_avg"] + (1 - beta1) * (grad - state["exp_avg"])
        square = beta2 * state["exp_avg_sq"] + (1 - beta2) * grad * grad
        spread = mx.sqrt(square) / hyper["correction"] + self.plan.adam_epsilon
        return param - hyper["step_size"] * mean / spread, {"exp_avg": mean, "exp_avg_sq": square}
