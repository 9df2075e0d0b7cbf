"""Learning-rate curves: the factor on the base learning rate as a function of the step, in Python doubles.

Each maker takes ``(warmup, total, base_lr, **options)``, all counts in optimizer steps, and returns ``factor(step)``
for steps from 0. The operations are those of transformers 5.23 ``optimization.py``, in its order, so that the
learning rates are equal to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from ...errors import SettingError

Curve = Callable[[int], float]


def _warm(warmup: int, after: Curve) -> Curve:
    """A linear rise from 0 over ``warmup`` steps, then ``after``."""
    return lambda step: step / max(1, warmup) if step < warmup else after(step)


def _progress(step: int, warmup: int, total: int) -> float:
    return (step - warmup) / max(1, total - warmup)


def _wave(progress: float, cycles: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * cycles * 2.0 * progress))


def _lift(factor: float, floor: float) -> float:
    """Squeeze a factor in [0, 1] into [floor, 1]."""
    return max(0.0, factor * (1 - floor) + floor)


def constant(warmup: int, total: int, base_lr: float) -> Curve:
    """``get_constant_schedule``: no warmup either."""
    return lambda step: 1.0


def constant_with_warmup(warmup: int, total: int, base_lr: float) -> Curve:
    """``get_constant_schedule_with_warmup``."""
    return _warm(warmup, lambda step: 1.0)


def linear(warmup: int, total: int, base_lr: float) -> Curve:
    """``get_linear_schedule_with_warmup``."""
    return _warm(warmup, lambda step: max(0.0, (total - step) / max(1, total - warmup)))


def cosine(warmup: int, total: int, base_lr: float, num_cycles: float = 0.5) -> Curve:
    """``get_cosine_schedule_with_warmup``."""
    return _warm(warmup, lambda step: _lift(_wave(_progress(step, warmup, total), float(num_cycles)), 0.0))


def cosine_with_restarts(warmup: int, total: int, base_lr: float, num_cycles: float = 1) -> Curve:
    """``get_cosine_with_hard_restarts_schedule_with_warmup``."""

    def decay(step: int) -> float:
        progress = _progress(step, warmup, total)
        if progress >= 1.0:
            return 0.0
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((num_cycles * progress) % 1.0))))

    return _warm(warmup, decay)


def polynomial(warmup: int, total: int, base_lr: float, lr_end: float = 1e-7, power: float = 1.0) -> Curve:
    """``get_polynomial_decay_schedule_with_warmup``.

    Raises:
        SettingError: ``lr_end`` is not below the learning rate.
    """
    if not base_lr > lr_end:
        raise SettingError(
            f'lr_scheduler_type="polynomial" with learning_rate={base_lr}, lr_end={lr_end}',
            "lr_end must be smaller than learning_rate",
            f'lr_scheduler_kwargs={{"lr_end": {base_lr / 10}}}' if base_lr > 0 else "learning_rate=2e-4",
        )

    def decay(step: int) -> float:
        # transformers divides by zero where the warmup fills the run, at the step after the last; the end is meant.
        if step > total or total == warmup:
            return lr_end / base_lr
        remaining = 1 - (step - warmup) / (total - warmup)
        return ((base_lr - lr_end) * remaining**power + lr_end) / base_lr

    return _warm(warmup, decay)


def inverse_sqrt(warmup: int, total: int, base_lr: float, timescale: float | None = None) -> Curve:
    """``get_inverse_sqrt_schedule``."""
    scale = (warmup or 10_000) if timescale is None else timescale
    shift = scale - warmup
    return _warm(warmup, lambda step: 1.0 / math.sqrt((step + shift) / scale))


def cosine_with_min_lr(
    warmup: int,
    total: int,
    base_lr: float,
    num_cycles: float = 0.5,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
) -> Curve:
    """``get_cosine_with_min_lr_schedule_with_warmup``; exactly one of ``min_lr`` and ``min_lr_rate``."""
    floor = _floor_rate(base_lr, min_lr, min_lr_rate)
    return _warm(warmup, lambda step: _lift(_wave(_progress(step, warmup, total), float(num_cycles)), floor))


def cosine_warmup_with_min_lr(
    warmup: int,
    total: int,
    base_lr: float,
    num_cycles: float = 0.5,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
    warmup_lr_rate: float | None = None,
) -> Curve:
    """``get_cosine_with_min_lr_schedule_with_warmup_lr_rate``: counts steps from 1, so step 0 already moves."""
    floor = _floor_rate(base_lr, min_lr, min_lr_rate)

    def factor(step: int) -> float:
        if step >= warmup:
            progress = (step - warmup + 1.0) / max(1.0, float(total - warmup))
            return _lift(_wave(progress, num_cycles), floor)
        if warmup_lr_rate is None:
            return (step + 1.0) / max(1.0, float(warmup))
        return warmup_lr_rate + (1.0 - warmup_lr_rate) * step / max(1, warmup - 1)

    return factor


def _floor_rate(base_lr: float, min_lr: float | None, min_lr_rate: float | None) -> float:
    if (min_lr is None) == (min_lr_rate is None):
        raise SettingError(
            f"lr_scheduler_kwargs with min_lr={min_lr} and min_lr_rate={min_lr_rate}",
            "exactly one of min_lr and min_lr_rate",
            'lr_scheduler_kwargs={"min_lr_rate": 0.1}',
        )
    if min_lr_rate is not None:
        return min_lr_rate
    assert min_lr is not None
    return min_lr / base_lr


_RISES: Mapping[str, Callable[[float], float]] = {
    "linear": lambda progress: progress,
    "cosine": lambda progress: 0.5 * (1.0 - math.cos(math.pi * progress)),
    "1-sqrt": lambda progress: 1.0 - math.sqrt(1.0 - progress),
}


def warmup_stable_decay(
    warmup: int,
    total: int,
    base_lr: float,
    num_decay_steps: int,
    num_stable_steps: int | None = None,
    warmup_type: str = "linear",
    decay_type: str = "cosine",
    min_lr_ratio: float = 0,
    num_cycles: float = 0.5,
) -> Curve:
    """``get_wsd_schedule``: rise, hold, fall, each scaled into [min_lr_ratio, 1]."""
    falls: Mapping[str, Callable[[float], float]] = {
        "linear": lambda progress: 1.0 - progress,
        "cosine": lambda progress: _wave(progress, float(num_cycles)),
        "1-sqrt": lambda progress: 1.0 - math.sqrt(progress),
    }
    rise, fall = _RISES[warmup_type], falls[decay_type]
    stable = total - warmup - num_decay_steps if num_stable_steps is None else num_stable_steps

    def factor(step: int) -> float:
        if step < warmup:
            return _lift(rise(step / max(1, warmup)), min_lr_ratio)
        if step < warmup + stable:
            return 1.0
        if step < warmup + stable + num_decay_steps:
            return _lift(fall((step - warmup - stable) / max(1, num_decay_steps)), min_lr_ratio)
        return min_lr_ratio

    return factor


CURVES: Mapping[str, Callable[..., Curve]] = {
    curve.__name__: curve
    for curve in (
        constant,
        constant_with_warmup,
        linear,
        cosine,
        cosine_with_restarts,
        polynomial,
        inverse_sqrt,
        cosine_with_min_lr,
        cosine_warmup_with_min_lr,
        warmup_stable_decay,
    )
}
