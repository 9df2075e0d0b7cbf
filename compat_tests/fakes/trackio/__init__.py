from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from recording import Config, note

from . import context_vars

__version__ = "0.30.0"
config = Config("trackio.config")


def init(project: str, name: str | None = None, space_id: str | None = None, **kwargs: Any) -> None:
    note("trackio.init", project, name, space_id, **kwargs)
    context_vars.current_space_id.set(space_id)
    context_vars.current_run.set(SimpleNamespace(_space_id=space_id, project=project, name=name))


def log(*args: Any, **kwargs: Any) -> None:
    note("trackio.log", *args, **kwargs)


def finish() -> None:
    note("trackio.finish")
    config.clear()


def freeze(**kwargs: Any) -> str:
    note("trackio.freeze", **kwargs)
    return "me/frozen"
