"""Where a run's report goes, and how it gets there."""

from __future__ import annotations

import os
from pathlib import Path

from ..atomic import replaced
from .page import render
from .run import Run

#: ``0`` writes none, another value is the file; where it is not set, ``report.html`` in ``output_dir``.
VARIABLE = "HF_MLX_REPORT"
NAME = "report.html"
OFF = ("0", "off", "no", "false")


def choose_place(output_dir: str | Path) -> Path | None:
    """The file of a run's report; None where none is wanted."""
    asked = os.environ.get(VARIABLE, "").strip()
    if asked.lower() in OFF:
        return None
    return Path(asked).expanduser() if asked not in ("", "1") else Path(output_dir) / NAME


def write_page(run: Run, path: Path) -> Path:
    """Write a run's page; it appears whole or not at all.

    Raises:
        OSError: It cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as temporary:
        temporary.write_text(render(run), encoding="utf-8")
    return path
