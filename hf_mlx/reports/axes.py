"""Scales of a chart: round ticks, and as many points as can be told apart."""

from __future__ import annotations

import math
from collections.abc import Sequence

Points = Sequence[tuple[float, float]]


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that span ``low`` to ``high``: multiples of 1, 2 or 5 times a power of ten.

    Args:
        low, high: Finite.
        count: About how many steps there are between them.
    """
    span = high - low
    if span <= abs(high) * 1e-12:
        span = abs(high) or 1.0
        low, high = low - span / 2, high + span / 2
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def thin(points: Points, most: int = 400) -> list[tuple[float, float]]:
    """At most ``most`` points: of each stretch the lowest and the highest, in their order."""
    if len(points) <= most:
        return list(points)
    kept: list[tuple[float, float]] = []
    stretches = most // 2
    for number in range(stretches):
        part = points[len(points) * number // stretches : len(points) * (number + 1) // stretches]
        ends = {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept


def show(value: float) -> str:
    """A number for an axis, short."""
    return f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e+")
