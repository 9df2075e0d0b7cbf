"""What ``hf-mlx run`` changes in its own process, and nowhere else.

A script that is run unedited imports its trainer from trl and asks CUDA things of torch and transformers. The user
asked for both to be answered by MLX by running it under this command; no other code path imports this package.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from ..errors import MissingDependency
from .arguments import translate_configs
from .homes import STAND_INS, StandIn
from .loading import translate_loading
from .trainers import derive_trainer, say

__all__ = ["install", "make_trainers", "say"]


def make_trainers(
    *, strict: bool = False, dry_run: bool = False, on_built: Callable[[], None] = lambda: None
) -> dict[StandIn, type]:
    """The classes that stand in for upstream's trainers during a run, one for each row of the table.

    Args:
        strict: Default of the trainers' own ``strict``.
        dry_run: ``train()`` prints what would happen and ends the script with status 0.
        on_built: Called when one has been constructed.
    """
    options: dict[str, Any] = {"strict": strict, "dry_run": dry_run, "on_built": on_built}
    return {row: derive_trainer(row.load(), row.name, **options) for row in STAND_INS}


def install(trainers: dict[StandIn, type]) -> None:
    """Put the trainers and the translations in place, for this process.

    Raises:
        MissingDependency: trl is not installed.
    """
    if find_spec("trl") is None:
        raise MissingDependency(
            "a script for trl without trl installed", "trl, whose other names the script imports", "pip install trl"
        )
    # Every home before the first change: trl's trainers derive from each other and from transformers'.
    homes = [(import_module(home), row.name, trainer) for row, trainer in trainers.items() for home in row.homes]
    for home, name, trainer in homes:
        setattr(home, name, trainer)
    translate_configs()
    translate_loading()
