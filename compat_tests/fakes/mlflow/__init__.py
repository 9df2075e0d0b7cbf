from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from recording import note

__version__ = "2.20.0"
utils = SimpleNamespace(validation=SimpleNamespace(MAX_PARAM_VAL_LENGTH=6000, MAX_PARAMS_TAGS_PER_BATCH=100))
_run: Any = None


def is_tracking_uri_set() -> bool:
    return False


def active_run() -> Any:
    return _run


def start_run(**kwargs: Any) -> None:
    global _run
    note("mlflow.start_run", **kwargs)
    _run = SimpleNamespace(info=SimpleNamespace(run_id="1"))


def end_run(*args: Any) -> None:
    global _run
    note("mlflow.end_run", *args)
    _run = None


def log_params(*args: Any, **kwargs: Any) -> None:
    note("mlflow.log_params", *args, **kwargs)


def log_metrics(*args: Any, **kwargs: Any) -> None:
    note("mlflow.log_metrics", *args, **kwargs)
