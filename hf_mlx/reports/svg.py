"""A chart as inline SVG: no script, no font and no file beside it. Colours are the page's classes."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from .axes import Points, show, thin, ticks
from .run import Series

#: Width and height of a panel, and of one over the whole page: both are shown at about their own size.
PANEL, WIDE = (420, 190), (1040, 300)
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 12, 28
_KINDS = 4


def draw(series: Sequence[Series], label: str, size: tuple[int, int] = PANEL) -> str:
    """One chart of one or more series over steps; empty where nothing can be drawn.

    Args:
        series: Drawn in the classes ``s0``, ``s1``, …
        label: What it shows, for those who hear the page.
        size: Width and height.
    """
    drawn = [(one.name, thin(one.finite)) for one in series if one.finite]
    if not drawn:
        return ""
    width, height = size
    across, up = ([point[axis] for _, points in drawn for point in points] for axis in (0, 1))
    rows = ticks(min(up), max(up))
    low, high = rows[0], rows[-1]
    begin, end = min(across), max(across)
    if begin == end:
        begin, end = begin - 1, end + 1

    def place(step: float, value: float) -> tuple[float, float]:
        x = _LEFT + (step - begin) / (end - begin) * (width - _LEFT - _RIGHT)
        y = height - _BOTTOM - (value - low) / (high - low) * (height - _TOP - _BOTTOM)
        return round(x, 1), round(y, 1)

    parts = []
    for value in rows:
        y = place(begin, value)[1]
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{y}" x2="{width - _RIGHT}" y2="{y}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">{show(value)}</text>')
    for step in ticks(begin, end, 5):
        if begin <= step <= end and step == int(step):
            x = place(step, low)[0]
            parts.append(f'<text x="{x}" y="{height - 8}" text-anchor="middle">{int(step)}</text>')
    for number, (name, points) in enumerate(drawn):
        parts.append(_line(points, name, f"s{number % _KINDS}", place))
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
        f"<title>{escape(label)}</title>{''.join(parts)}</svg>"
    )


def _line(points: Points, name: str, kind: str, place: object) -> str:
    placed = [place(*point) for point in points]  # type: ignore[operator]
    path = " ".join(f"{x},{y}" for x, y in placed)
    line = f'<polyline class="{kind}" points="{path}"/>' if len(placed) > 1 else ""
    # A dot a point where they can be told apart: it carries the number, and shows a series of one.
    dots = [
        f'<circle class="{kind}" cx="{x}" cy="{y}" r="{2.5 if len(placed) < 80 else 1.2}">'
        f"<title>{escape(name)} {show(value)} at step {step:g}</title></circle>"
        for (x, y), (step, value) in zip(placed, points, strict=True)
    ]
    return line + "".join(dots)
