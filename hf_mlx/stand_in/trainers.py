"""The classes that stand in for upstream's trainers during a run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from .callers import is_library
from .talk import say


def derive_trainer(
    base: type,
    upstream: type,
    name: str,
    *,
    strict: bool = False,
    dry_run: bool = False,
    on_built: Callable[[], None] = lambda: None,
) -> type:
    """A trainer of this library under upstream's name.

    Args:
        base: The trainer.
        upstream: The one it stands in for. It is built instead, and left to torch, where ``base.trains`` says no; and
            it takes the base's place in what a library derives, or a script for such a model.
        name: Upstream's name.
        strict: Default of the trainer's own ``strict``.
        dry_run: ``train()`` prints what would happen and ends the script with status 0.
        on_built: Called when one has been constructed.
    """

    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, *args, **{"strict": strict} | kwargs)  # type: ignore[misc]
        built.add(type(self))
        on_built()
        say(self.ledger.as_text(changed_only=True))

    def choose(cls: type, *args: Any, **kwargs: Any) -> Any:
        model = args[0] if args else kwargs.get("model")
        if not hasattr(base, "trains") or base.trains(model) or cls in built:
            return object.__new__(cls)
        if cls is made:
            return upstream(*args, **kwargs)
        derive_from(cls, made, upstream)
        return object.__new__(cls)

    def derived(cls: type, **kwargs: Any) -> None:
        super(made, cls).__init_subclass__(**kwargs)  # pyright: ignore[reportArgumentType]
        if hasattr(base, "trains") and is_library(sys._getframe(1)):
            derive_from(cls, made, upstream)

    def describe(self: Any, *args: Any, **kwargs: Any) -> Any:
        from ..surface.estimate import describe_run

        print(describe_run(self))
        raise SystemExit(0)

    members: dict[str, Any] = {
        "__doc__": base.__doc__, "__init__": construct, "__module__": base.__module__, "__new__": choose,
        "upstream": upstream, "__init_subclass__": classmethod(derived),
    }  # fmt: skip
    built: set[type] = set()
    if dry_run:
        members |= dict.fromkeys(("train", "evaluate", "predict"), describe)
    made = type(name, (base,), members)
    return made


def derive_from(cls: type, old: type, new: type) -> None:
    """Let ``cls``, and what stands between it and ``old``, derive from ``new`` instead: the same class objects, so that
    ``super()`` and the names that a script has for them stay good."""
    for derived in cls.__mro__[: cls.__mro__.index(old)]:
        if old in derived.__bases__:
            derived.__bases__ = tuple(new if base is old else base for base in derived.__bases__)
            if "__new__" not in vars(derived):
                # A class that has had another __new__ than object's hands its arguments on to it.
                derived.__new__ = staticmethod(_make)


def _make(cls: type, *args: Any, **kwargs: Any) -> Any:
    return object.__new__(cls)
