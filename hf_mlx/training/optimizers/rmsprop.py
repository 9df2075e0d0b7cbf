"""RMSprop."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from .contract import Arrays, Optimizer


class RMSprop(Optimizer):
    """``torch.optim.RMSprop`` of torch 2.13; ``optim_args`` may set momentum, alpha, eps and centered."""

    defaults: Mapping[str, float | bool] = {"momentum": 0.0, "alpha": 0.99, "eps": 1e-8, "centered": False}

    def slots(self, param: mx.array) -> Mapping[str, tuple[int, ...]]:
        names = ["square_avg"]
        if self.options["momentum"]:
            names.append("momentum_buffer")
        if self.options["centered"]:
            names.append("grad_avg")
        return {name: param.shape for name in names}

    def hyper(self, step: int, lr: float) -> dict[str, float]:
        return {"lr": lr}

    def apply(
        self, param: mx.array, grad: mx.array, state: Arrays, hyper: Mapping[str, mx.array], weight_decay: float
    ) -> tuple[mx.array, Arrays]:
        alpha, momentum = self.options["alpha"], self.options["momentum"]
        if weight_decay:
            grad = grad + weight_decay * param
        square = alpha * state["square_avg"] + (1 - alpha) * grad * grad
        moved = {"square_avg": square}
        variance = square
        if self.options["centered"]:
            moved["grad_avg"] = state["grad_avg"] + (1 - alpha) * (grad - state["grad_avg"])
            variance = square - moved["grad_avg"] * moved["grad_avg"]
        direction = grad / (mx.sqrt(variance) + self.options["eps"])
        if momentum:
            direction = moved["momentum_buffer"] = momentum * state["momentum_buffer"] + direction
        return param - hyper["lr"] * direction, moved
