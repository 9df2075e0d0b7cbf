"""Scripts that name this library's trainers themselves: the command's flags are theirs too."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from .imports import Imports
from .trainers import describe

_HOME = "hf_mlx.trainers.base"


def follow_own(imports: Imports, *, strict: bool, dry_run: bool, on_built: Callable[[], None]) -> None:
    """Give this process's ``MLXSFTTrainer`` and the others what the stand-ins derived from them have.

    Args:
        imports: Where to wait for them.
        strict: Default of their own ``strict``.
        dry_run: ``train()`` prints what would happen and ends the script with status 0.
        on_built: Called when one has been constructed.
    """

    def change(module: Any) -> None:
        base = module.TrainerBase
        construct = base.__init__

        @functools.wraps(construct)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            construct(self, *args, **{**kwargs, "strict": kwargs.get("strict", False) or strict})
            on_built()

        base.__init__ = __init__
        if dry_run:
            base.train = base.evaluate = base.predict = describe

    imports.after(_HOME, change)
