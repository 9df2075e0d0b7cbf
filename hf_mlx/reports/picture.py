"""The loss as a PNG, through matplotlib where it is installed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..atomic import replaced
from ..errors import MissingDependency
from .run import Series


def write_picture(series: Sequence[Series], path: str | Path, *, title: str = "") -> Path:
    """Draw series over steps into a file; its ending (png, svg, pdf) is the format.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependency(
            f"a picture without matplotlib ({error})", "matplotlib", "pip install matplotlib"
        ) from error
    path = Path(path)
    # A figure of its own: no window system is asked for, and pyplot's current figure stays the script's.
    axes = (figure := Figure(figsize=(7, 3.5), layout="constrained")).add_subplot()
    for one in series:
        points = one.finite
        axes.plot([step for step, _ in points], [value for _, value in points], marker=".", label=one.name)
    axes.set(xlabel="step", ylabel="loss", title=title)
    if any(one.finite for one in series):
        axes.legend()
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as temporary:
        figure.savefig(temporary, dpi=144)
    return path
