from __future__ import annotations

import contextlib
import io
import os
from typing import Any

from recording import Config, Recorder, note

run: Any = None
config = Config("wandb.config")
summary: dict[str, Any] = {}


def init(*args: Any, **kwargs: Any) -> Any:
    global run
    note("wandb.init", *args, **kwargs)
    run = Recorder("wandb.run", id="1", name="first", url="https://wandb.ai/me/runs/1", summary=summary)
    return run


def log(*args: Any, **kwargs: Any) -> None:
    note("wandb.log", *args, **kwargs)


def watch(*args: Any, **kwargs: Any) -> None:
    note("wandb.watch", *args, **kwargs)


def define_metric(*args: Any, **kwargs: Any) -> None:
    note("wandb.define_metric", *args, **kwargs)


def log_artifact(artifact: Any, **kwargs: Any) -> None:
    note("wandb.log_artifact", sorted(artifact.files), **kwargs)


def finish(*args: Any, **kwargs: Any) -> None:
    global run
    note("wandb.finish", *args, **kwargs)
    run = None
    summary.clear()
    config.clear()


class Artifact:
    def __init__(self, name: str, type: str, metadata: dict[str, Any]) -> None:
        note("wandb.Artifact", name, type, metadata)
        self.files: list[str] = []
        self.named_parameters = None

    @contextlib.contextmanager
    def new_file(self, name: str, mode: str = "w") -> Any:
        self.files.append(name)
        note("wandb.Artifact.new_file", name)
        yield io.BytesIO()

    def add_dir(self, path: str) -> None:
        self.files += os.listdir(path)
        note("wandb.Artifact.add_dir", os.path.basename(path), sorted(os.listdir(path)))
