"""Configuration classes take the names that older scripts write."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any

from ..settings.legacy import translate_arguments
from .homes import STAND_INS
from .trainers import say


def translate_configs() -> None:
    """Let every configuration class of the table take older names, which are said."""
    for where in dict.fromkeys(config for row in STAND_INS for config in row.configs):
        module, _, name = where.partition(":")
        cls = getattr(import_module(module), name)
        cls.__init__ = _translated(cls.__init__)


def _translated(original: Callable) -> Callable:
    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        kwargs, notes = translate_arguments(kwargs)
        for note in notes:
            say(f"hf-mlx run: {note}")
        original(self, *args, **kwargs)

    return __init__
