"""Adafactor as the Trainer uses it: an external learning rate, no parameter scaling."""

from __future__ import annotations

import math
from collections.abc import Mapping

import mlx.core as mx

from .contract import Arrays, Optimizer

EPS = 1e-30
CLIP_THRESHOLD = 1.0
DECAY_RATE = -0.8


class Adafactor(Optimizer):
    """``transformers.optimization.Adafactor`` of 5.23 with ``scale_parameter=False, relative_step=False``.

    Arrays of two and more dimensions keep only row and column means of the squared gradient. The state is float32
    whatever the parameter's dtype.
    """

    elementwise = False

    def slots(self, param: mx.array) -> Mapping[str, tuple[int, ...]]:
        shape = param.shape
        if len(shape) < 2:
            return {"exp_avg_sq": shape}
        return {"exp_avg_sq_row": shape[:-1], "exp_avg_sq_col": (*shape[:-2], shape[-1])}

    def state_dtype(self, param: mx.array) -> mx.Dtype:
        return mx.float32

    def hyper(self, step: int, lr: float) -> dict[str, float]:
        keep = 1.0 - math.pow(step, DECAY_RATE)
        return {"lr": lr, "keep": keep, "intake": 1.0 - keep, "decay": lr * self.plan.weight_decay}

    def apply(
        self, param: mx.array, grad: mx.array, state: Arrays, hyper: Mapping[str, mx.array], weight_decay: float
    ) -> tuple[mx.array, Arrays]:
        square = grad * grad + EPS

        def blend(name: str, value: mx.array) -> mx.array:
            return hyper["keep"] * state[name] + hyper["intake"] * value

        if "exp_avg_sq" in state:
            moved = {"exp_avg_sq": blend("exp_avg_sq", square)}
            update = mx.rsqrt(moved["exp_avg_sq"]) * grad
        else:
            row = blend("exp_avg_sq_row", square.mean(axis=-1))
            col = blend("exp_avg_sq_col", square.mean(axis=-2))
            moved = {"exp_avg_sq_row": row, "exp_avg_sq_col": col}
            row_factor = mx.rsqrt(row / row.mean(axis=-1, keepdims=True))
            update = mx.expand_dims(row_factor, -1) * mx.expand_dims(mx.rsqrt(col), -2) * grad
        rms = mx.sqrt(mx.square(update).sum()) / math.sqrt(update.size)
        update = update / mx.maximum(rms / CLIP_THRESHOLD, 1.0) * hyper["lr"]
        if weight_decay:
            param = param - hyper["decay"] * param
        return param - update, moved
