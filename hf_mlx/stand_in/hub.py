"""The hub's login where the hub cannot be reached, and what ``load_dataset`` was once told about it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from .imports import Imports
from .talk import Talk


def go_on_without_login(imports: Imports, talk: Talk) -> None:
    """Let ``login`` and its kin say that the hub is out of reach, once huggingface_hub is imported."""

    def change(module: Any) -> None:
        for name in ("login", "notebook_login", "interpreter_login"):
            setattr(module, name, _tried(getattr(module, name), name, talk))

    imports.after("huggingface_hub._login", change)


def translate_datasets(imports: Imports, talk: Talk) -> None:
    """Let ``load_dataset`` take keywords that left in datasets 3.0, once it is imported."""

    def change(module: Any) -> None:
        original: Callable = module.load_dataset

        @functools.wraps(original)
        def load_dataset(*args: Any, **kwargs: Any) -> Any:
            if "use_auth_token" in kwargs:
                token = kwargs.pop("use_auth_token")
                kwargs.setdefault("token", token)
                talk.once("load_dataset's use_auth_token is now token")
            if kwargs.pop("ignore_verifications", False):
                kwargs.setdefault("verification_mode", "no_checks")
                talk.once('load_dataset\'s ignore_verifications=True is now verification_mode="no_checks"')
            if kwargs.get("task", "") is None:
                del kwargs["task"]
            return original(*args, **kwargs)

        module.load_dataset = load_dataset

    imports.after("datasets.load", change)


def _tried(original: Callable, name: str, talk: Talk) -> Callable:
    @functools.wraps(original)
    def login(*args: Any, **kwargs: Any) -> None:
        from huggingface_hub import errors

        try:
            original(*args, **kwargs)
        # No terminal to ask at, no network.
        except (OSError, EOFError, errors.HTTPError) as error:
            if isinstance(error, errors.HfHubHTTPError):
                # The hub was there, and said no.
                raise
            reason = str(error).partition("\n")[0] or type(error).__name__
            talk.once(f"huggingface_hub.{name}(): nobody is logged in ({reason})")

    return login
