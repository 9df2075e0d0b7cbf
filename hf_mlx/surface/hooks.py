"""Subclasses that override what this trainer would never call."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import SettingError


def check_overrides(cls: type, base: type, never_called: Mapping[str, str]) -> None:
    """Refuse a subclass whose override would never run.

    Args:
        cls: The class that is being constructed.
        base: The trainer it derives from.
        never_called: Methods that no step would call, with what to write instead.

    Raises:
        SettingError: Names the method and its replacement.
    """
    for derived in cls.__mro__[: cls.__mro__.index(base)]:
        for name in vars(derived):
            if name in never_called:
                raise SettingError(
                    f"{derived.__name__}.{name}(), which overrides a method of transformers' trainer",
                    "overrides that this trainer calls (log, evaluate, predict, save_model, train)",
                    never_called[name],
                )
