"""Changes to a module that are made when, and only when, the script imports it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class Imports:
    """Runs functions right after a module has been imported, before whoever imports it goes on.

    A finder of ``sys.meta_path``; ``importlib.abc``, whose base class it could have, takes time to import.
    """

    def __init__(self) -> None:
        self._after: dict[str, list[Callable[[Any], None]]] = {}
        self._empty: dict[str, Callable[[], bool]] = {}

    def watch(self) -> None:
        """Look at every import of this process from here on."""
        sys.meta_path.insert(0, self)  # type: ignore[arg-type]

    def after(self, name: str, change: Callable[[Any], None]) -> None:
        """Call ``change(module)`` once ``name`` is imported; at once where it is already."""
        if name in sys.modules:
            change(sys.modules[name])
        else:
            self._after.setdefault(name, []).append(change)

    def provide(self, name: str, offered: Callable[[], bool] = lambda: True) -> None:
        """Let ``name`` be imported as an empty package where there is none, while ``offered()``."""
        self._empty[name] = offered

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that the other finders give, with the changes behind its loader."""
        if fullname not in self._after and fullname not in self._empty:
            return None
        found = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is None and fullname in self._empty and self._empty[fullname]():
            spec = ModuleSpec(fullname, _Empty(), is_package=True)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                for change in self._after.pop(fullname, ()):
                    # A lazy package puts another object in its place.
                    change(sys.modules[fullname])

            # On this loader alone: everything else that may be asked of it stays its own.
            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


class _Empty:
    def create_module(self, spec: ModuleSpec) -> None:
        """A module as any other."""

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is in it but what is put there afterwards."""


def is_initializing(name: str) -> bool:
    """Whether an import of ``name`` is under way."""
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))
