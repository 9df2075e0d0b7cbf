"""What stands in for a tracker's package: every call is written down, with what it was called with."""

from __future__ import annotations

import math
from typing import Any

CALLS: list[list[Any]] = []
# What depends on the clock.
TIMED = ("runtime", "per_second")


def plain(value: Any) -> Any:
    """``value`` as JSON has it, without what a clock makes."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items() if not any(part in str(k) for part in TIMED)}
    if isinstance(value, (list, tuple, set)):
        return [plain(part) for part in (sorted(value, key=str) if isinstance(value, set) else value)]
    if isinstance(value, float):
        return "nan" if math.isnan(value) else value
    if isinstance(value, (int, str, bool, type(None))):
        return value
    if hasattr(value, "to_dict"):
        return plain(value.to_dict())
    return f"a {'model' if hasattr(value, 'named_parameters') else type(value).__name__}"


def note(called: str, /, *args: Any, **kwargs: Any) -> None:
    """Write down a call."""
    CALLS.append([called, plain(args), plain(kwargs)])


class Recorder:
    """An object of which every method is written down.

    Args:
        called: How calls of it are named.
        attributes: What is read from it.
    """

    def __init__(self, called: str, /, **attributes: Any) -> None:
        self._called = called
        vars(self).update(attributes)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__") and "internal_api" not in name:
            raise AttributeError(name)

        def call(*args: Any, **kwargs: Any) -> None:
            note(f"{self._called}.{name}", *args, **kwargs)

        return call


class Config(dict):
    """A tracker's config, whose writes are written down."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def update(self, values: Any, **options: Any) -> None:
        note(f"{self._name}.update", values, **options)
        super().update(values)

    def __setitem__(self, key: Any, value: Any) -> None:
        note(f"{self._name}[]", key, value)
        super().__setitem__(key, value)
