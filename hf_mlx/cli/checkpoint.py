"""``hf-mlx checkpoint``: what a checkpoint holds, and its state from one file format to the other."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command to ``hf-mlx``."""
    parser = subparsers.add_parser(
        "checkpoint",
        help="convert a checkpoint's optimizer and random state to or from torch's files",
        description="Convert a checkpoint in place. to-torch writes optimizer.pt, scheduler.pt and rng_state.pth, "
        "which TRL resumes from; from-torch writes safetensors and JSON, which need no torch.",
    )
    parser.add_argument("direction", choices=("to-torch", "from-torch"), help="which files to write")
    parser.add_argument("folder", metavar="DIR", type=Path, help="a checkpoint-N folder")
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> int:
    """Convert the folder; returns the exit status."""
    from ..checkpoints.convert import from_torch, to_torch
    from ..training.optim import decay_names

    folder = options.folder
    written = to_torch(folder) if options.direction == "to-torch" else from_torch(folder, decay_names)
    print(f"{folder}: wrote {', '.join(written)}" if written else f"{folder}: nothing to convert")
    return 0
