"""``hf-mlx reward``: the flags of ``trl reward``, trained by MLX."""

from __future__ import annotations

import argparse
from typing import Any

from .sft import add_trl_command


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command to ``hf-mlx``."""
    return add_trl_command(subparsers, "reward", "Training of a reward model")
