"""Methods of model code that call a function of ours in the place of one they import; the code itself is left alone."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any


def calls(method: Any, name: str, function: Callable[..., Any]) -> bool:
    """Whether ``method`` calls ``function`` by the global ``name``."""
    return (
        isinstance(method, FunctionType)
        and name in method.__code__.co_names
        and method.__globals__.get(name) is function
    )


def rebound(method: FunctionType, name: str, function: Callable[..., Any]) -> Any:
    """``method`` with ``function`` for the global ``name``."""
    known = {**method.__globals__, name: function}
    inner = FunctionType(method.__code__, known, method.__name__, method.__defaults__, method.__closure__)
    inner.__kwdefaults__ = method.__kwdefaults__
    return inner
