"""The classes that stand in for upstream's trainers during a run."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

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
        upstream: The one it stands in for; it is built instead where ``base.trains`` says so, and left to torch.
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
        on_built()
        say(self.ledger.as_text(changed_only=True))

    # Scripts look for the keywords of the release that is installed.
    construct.__signature__ = inspect.signature(upstream.__init__)  # type: ignore[attr-defined]

    def choose(cls: type, *args: Any, **kwargs: Any) -> Any:
        # What a script derives from this class can only be this class.
        if cls is made and hasattr(base, "trains"):
            given = translate(dict(zip(positional, args, strict=False)) | kwargs)
            if not base.trains(given.get("model")) or getattr(given.get("args"), "predict_with_generate", False):
                return upstream(**given)
        return object.__new__(cls)

    def describe(self: Any, *args: Any, **kwargs: Any) -> Any:
        from ..surface.estimate import describe_run

        print(describe_run(self))
        raise SystemExit(0)

    members: dict[str, Any] = {
        "__doc__": base.__doc__, "__init__": construct, "__module__": base.__module__, "__new__": choose,
        "upstream": upstream,
    }  # fmt: skip
    if dry_run:
        members |= dict.fromkeys(("train", "evaluate", "predict"), describe)
    made = type(name, (base,), members)
    return made
