"""A loss chart in characters, and answers in two columns."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from textwrap import wrap

from .axes import show, ticks
from .run import Series

_MARKS = "●○◆◇"
_PLAIN = "*o+x"


def draw_text(series: Sequence[Series], *, width: int = 72, height: int = 12, unicode: bool = True) -> str:
    """Series over steps as lines of text; of the steps that share a column, their mean.

    Args:
        series: A mark each.
        width: Columns, the numbers at the left included.
        height: Rows, without the steps' line and the legend.
        unicode: Whether the marks may be other than ASCII.

    Returns:
        The chart; a line that says so where no finite number was logged.
    """
    drawn = [one for one in series if one.finite]
    if not drawn:
        return "no finite loss was logged"
    values = [value for one in drawn for _, value in one.finite]
    steps = [step for one in drawn for step, _ in one.finite]
    rows = ticks(min(values), max(values))
    low, high, begin, end = rows[0], rows[-1], min(steps), max(steps)
    labels = {round((high - row) / (high - low) * (height - 1)): show(row) for row in rows}
    margin = max(4, *map(len, labels.values()))
    columns = max(width - margin - 2, 10)
    grid = [[" "] * columns for _ in range(height)]
    marks = _MARKS if unicode else _PLAIN
    for number, one in enumerate(drawn):
        held: dict[int, list[float]] = {}
        for step, value in one.finite:
            place = 0 if end == begin else round((step - begin) / (end - begin) * (columns - 1))
            held.setdefault(place, []).append(value)
        for place, found in held.items():
            row = round((high - sum(found) / len(found)) / (high - low) * (height - 1))
            grid[row][place] = marks[number % len(marks)]
    side = "│" if unicode else "|"
    lines = [f"{labels.get(row, ''):>{margin}} {side}{''.join(cells).rstrip()}" for row, cells in enumerate(grid)]
    foot = f"{begin:g}".ljust(columns - len(f"{end:g}")) + (f"{end:g}" if end != begin else "")
    legend = "   ".join(f"{marks[number % len(marks)]} {one.name}" for number, one in enumerate(drawn))
    return "\n".join([*lines, f"{'step':>{margin}}  {foot.rstrip()}", f"{'':>{margin}}  {legend}"])


def side_by_side(rows: Sequence[tuple[str, str, str]], *, width: int = 100) -> str:
    """Prompts with what was answered before and after, in two columns.

    Args:
        rows: Prompt, before, after.
        width: Of both columns together.
    """
    column = (width - 3) // 2
    lines = [f"{'before':<{column}} | after", f"{'-' * column}-+-{'-' * column}"]
    for prompt, before, after in rows:
        parts = [_wrapped(text, column) or [""] for text in (before, after)]
        lines += _wrapped(prompt, width)
        lines += [f"{left:<{column}} | {right}".rstrip() for left, right in zip_longest(*parts, fillvalue="")]
        lines.append("")
    return "\n".join(lines)


def _wrapped(text: str, width: int) -> list[str]:
    shown = "".join(
        letter if letter.isprintable() or letter == "\n" else "\N{REPLACEMENT CHARACTER}" for letter in text
    )
    return [part for line in shown.splitlines() for part in wrap(line, width)]
