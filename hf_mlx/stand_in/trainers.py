"""The classes that stand in for upstream's trainers during a run."""

from __future__ import annotations

import inspect
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
    translate: Callable[[dict[str, Any]], dict[str, Any]] = dict,
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
        translate: Makes today's keyword arguments of those that the script wrote.
    """
    parameters = list(inspect.signature(base.__init__).parameters.values())[1:]
    positional = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]

    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        twice = set(positional[: len(args)]) & kwargs.keys()
        if twice or len(args) > len(positional):
            # Its own TypeError.
            base.__init__(self, *args, **kwargs)  # type: ignore[misc]
        given = translate(dict(zip(positional, args, strict=False)) | kwargs)
        base.__init__(self, **{"strict": strict} | given)  # type: ignore[misc]
        built.add(type(self))
        on_built()
        say(self.ledger.as_text(changed_only=True))

    # Scripts look for the keywords of the release that is installed.
    construct.__signature__ = inspect.signature(upstream.__init__)  # type: ignore[attr-defined]

    def choose(cls: type, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(positional, args, strict=False)) | kwargs
        here = base.trains(given.get("model")) if hasattr(base, "trains") else True
        if cls is made and (not here or getattr(given.get("args"), "predict_with_generate", False)):
            return upstream(**translate(given))
        if not here and cls not in built:
            derive_from(cls, made, upstream)
        return object.__new__(cls)

    def derived(cls: type, **kwargs: Any) -> None:
        super(made, cls).__init_subclass__(**kwargs)  # pyright: ignore[reportArgumentType]
        if hasattr(base, "trains") and is_library(sys._getframe(1)):
            derive_from(cls, made, upstream)

    def set_tokenizer(self: Any, tokenizer: Any) -> None:
        self.processing_class = tokenizer

    members: dict[str, Any] = {
        # Its name until transformers 5.0.
        "tokenizer": property(lambda self: self.processing_class, set_tokenizer),
        "__doc__": base.__doc__, "__init__": construct, "__module__": base.__module__, "__new__": choose,
        "upstream": upstream, "__init_subclass__": classmethod(derived),
    }  # fmt: skip
    built: set[type] = set()
    if dry_run:
        members |= dict.fromkeys(("train", "evaluate", "predict"), describe)
    made = type(name, (base,), members)
    return made


def describe(trainer: Any, *args: Any, **kwargs: Any) -> Any:
    """In the place of ``train()``: print what would happen, and end the script."""
    from ..surface.estimate import describe_run

    print(describe_run(trainer))
    raise SystemExit(0)


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
