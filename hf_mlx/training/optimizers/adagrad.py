"""Adagrad."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from .contract import Arrays, Optimizer


class Adagrad(Optimizer):
    """``torch.optim.Adagrad`` of torch 2.13; ``optim_args`` may set ``lr_decay`` and ``eps``."""

    defaults: Mapping[str, float] = {"lr_decay": 0.0, "eps": 1e-10}

    def slots(self, param: mx.array) -> Mapping[str, tuple[int, ...]]:
        return {"sum": param.shape}

    def hyper(self, step: int, lr: float) -> dict[str, float]:
        return {"lr": lr / (1 + (step - 1) * self.options["lr_decay"])}

    def apply(
        self, param: mx.array, grad: mx.array, state: Arrays, hyper: Mapping[str, mx.array], weight_decay: float
    ) -> tuple[mx.array, Arrays]:
        if weight_decay:
            grad = grad + weight_decay * param
        total = state["sum"] + grad * grad
        return param - hyper["lr"] * grad / (mx.sqrt(total) + self.options["eps"]), {"sum": total}
