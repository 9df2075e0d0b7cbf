"""Methods of model code with a global of ours in the place of one they import; the code itself is left alone."""

from __future__ import annotations

from types import FunctionType
from typing import Any


def methods(kind: type[Any]) -> dict[str, FunctionType]:
    """What a class has of methods by name, inherited ones too."""
    members = {name: member for base in reversed(kind.__mro__) for name, member in vars(base).items()}
    return {name: member for name, member in members.items() if isinstance(member, FunctionType)}


def calls(method: Any, name: str, value: Any) -> bool:
    """Whether ``method`` reads ``value`` from the global ``name``."""
    return (
        isinstance(method, FunctionType) and name in method.__code__.co_names and method.__globals__.get(name) is value
    )


def rebound(method: FunctionType, name: str, value: Any) -> Any:
    """``method`` with ``value`` for the global ``name``."""
    known = {**method.__globals__, name: value}
    inner = FunctionType(method.__code__, known, method.__name__, method.__defaults__, method.__closure__)
    inner.__kwdefaults__ = method.__kwdefaults__
    return inner
