"""``hf-mlx report``: the curve of a run that is over, in the terminal, as HTML and as a picture."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

from ..errors import CheckpointError


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the ``report`` command."""
    parser = subparsers.add_parser(
        "report",
        help="chart the loss of a run in the terminal, as HTML or as PNG",
        description="Read what a trainer logged (trainer_state.json, of any trainer of transformers or trl) and draw "
        "its loss in the terminal. A folder with checkpoints stands for the newest of them.",
    )
    parser.add_argument("folder", metavar="RUN", type=Path, help="an output_dir, a checkpoint, or a trainer_state.json")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write every curve as one HTML file")
    parser.add_argument("--png", type=Path, metavar="FILE", help="also draw the loss with matplotlib")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    from ..reports.picture import write_picture
    from ..reports.place import write_page
    from ..reports.run import Run, read_series
    from ..reports.terminal import draw_text

    state = _read(arguments.folder)
    history = state.get("log_history") or []
    facts = {"steps": f"{state.get('global_step', 0)} of {state.get('max_steps', 0)}"}
    run = Run(str(arguments.folder), facts, read_series(history))
    encoding = (sys.stdout.encoding or "ascii").lower()
    width = min(shutil.get_terminal_size().columns, 100)
    print(draw_text(run.losses, width=width, unicode=encoding.startswith("utf")))
    print(run.describe_loss() if encoding.startswith("utf") else run.describe_loss().replace("\u2192", "->"))
    if arguments.html:
        print(f"wrote {write_page(run, arguments.html)}")
    if arguments.png:
        print(f"wrote {write_picture(run.losses, arguments.png, title=run.title)}")


def _read(run: Path) -> dict[str, Any]:
    from ..checkpoints.folders import list_checkpoints
    from ..checkpoints.inspection import STATE, read_trainer_state
    from ..intake import lies

    if run.name == STATE:
        return read_trainer_state(run.parent)
    found = [folder for folder in (run, *reversed(list_checkpoints(run))) if lies(folder / STATE)]
    if not found:
        raise CheckpointError(
            f"{run}, without a {STATE} in it or in a checkpoint",
            "the output_dir of a run that saved something, one of its checkpoints, or its trainer_state.json",
            "trainer.save_state() writes one; a run of hf-mlx leaves report.html in its output_dir as it is",
        )
    return read_trainer_state(found[0])
