from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from recording import Recorder, note

config = SimpleNamespace(get_config=lambda name: "key")
_experiment: Any = None


class ExperimentConfig:
    def __init__(self, name: str | None = None) -> None:
        note("comet.ExperimentConfig", name)


def start(**kwargs: Any) -> Any:
    global _experiment
    note("comet.start", **kwargs)
    _experiment = Recorder("comet", url="https://comet.com/me/1")
    return _experiment


def get_running_experiment() -> Any:
    return _experiment
