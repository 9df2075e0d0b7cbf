"""Methods of model code with a global of ours in the place of one they import; the code itself is left alone."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any


def methods(kind: type[Any]) -> dict[str, FunctionType]:
    """What a class has of methods by name, inherited ones too."""
    members = {name: member for base in reversed(kind.__mro__) for name, member in vars(base).items()}
    return {name: member for name, member in members.items() if isinstance(member, FunctionType)}


def with_methods(kind: type[Any], replaced: Callable[[FunctionType], Any]) -> type[Any] | None:
    """A subclass of ``kind`` with other methods; None where ``replaced`` gives back all as they are."""
    made = {name: (method, replaced(method)) for name, method in methods(kind).items()}
    replacing = {name: ours for name, (method, ours) in made.items() if ours is not method}
    # What error messages call it.
    return type(kind.__name__, (kind,), replacing) if replacing else None


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


class Changed:
    """A module with other functions in the place of its own.

    Args:
        module: Whose attributes it has otherwise.
        functions: By name.
    """

    def __init__(self, module: Any, **functions: Any) -> None:
        self.__dict__.update(functions)
        self._module, self._names = module, tuple(functions)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def is_named_in(self, method: FunctionType) -> bool:
        """Whether ``method`` names one of those functions."""
        return any(name in method.__code__.co_names for name in self._names)
