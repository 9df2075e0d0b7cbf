"""Changes to a module that are made when, and only when, the script imports it."""

from __future__ import annotations

import functools
import importlib.util
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
        importlib.util.find_spec = _installed(importlib.util.find_spec)

    def after(self, name: str, change: Callable[[Any], None]) -> None:
        """Call ``change(module)`` each time ``name`` is executed, and at once where it has been.

        A package may be executed twice, as transformers is by one of its own modules.
        """
        self._after.setdefault(name, []).append(change)
        if name in sys.modules:
            change(sys.modules[name])

    def provide(
        self,
        name: str,
        offered: Callable[[], bool] = lambda: True,
        fill: Callable[[Any], None] = lambda module: None,
    ) -> None:
        """Let ``name`` and what is below it be imported where there is none, while ``offered()``.

        Args:
            name: A package.
            offered: Whether whoever imports it now shall find it.
            fill: Called with each of its modules that is made, to put something in.
        """
        self._empty[name] = offered

        def fill_empty(module: Any) -> None:
            if is_offered(module):
                fill(module)

        self.after(name, fill_empty)
        self._after.setdefault(f"{name}.", []).append(fill_empty)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that the other finders give, with the changes behind its loader."""
        package = next((name for name in self._empty if fullname == name or fullname.startswith(f"{name}.")), None)
        if fullname not in self._after and package is None:
            return None
        found = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is None and package is not None and self._empty[package]():
            spec = ModuleSpec(fullname, _Empty(), is_package=True)  # type: ignore[arg-type]
        changes = [*self._after.get(fullname, ())]
        if package is not None and fullname != package:
            changes += self._after.get(f"{package}.", ())
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                for change in changes:
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


def is_offered(module: Any) -> bool:
    """Whether a module stands for a package that is not installed."""
    return isinstance(getattr(getattr(module, "__spec__", None), "loader", None), _Empty)


def _installed(original: Callable) -> Callable:
    """Libraries ask ``importlib.util.find_spec`` whether they may use a package."""

    @functools.wraps(original)
    def find_spec(name: str, package: str | None = None) -> ModuleSpec | None:
        spec = original(name, package)
        return None if spec is not None and isinstance(spec.loader, _Empty) else spec

    return find_spec


def is_initializing(name: str) -> bool:
    """Whether an import of ``name`` is under way."""
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))
