"""transformers' own integrations with trackers: what they need of a model, and what runs they link to."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from ..errors import SettingError
from .facade import MLXCausalLM

_WATCHED = ("gradients", "parameters", "all")


def prepare_trackers(handler: Any) -> None:
    """Let the trackers among the callbacks save a model that was named, as transformers' objects; refuse hooks.

    Args:
        handler: ``transformers.CallbackHandler``. Its callbacks are changed on the instance.

    Raises:
        SettingError: ``WANDB_WATCH`` asks for hooks in torch's passes, of which there are none; or
            ``WANDB_LOG_MODEL`` for a model that has no copy in torch.
    """
    from transformers.integrations import DVCLiveCallback, WandbCallback

    for callback in handler.callbacks:
        if isinstance(callback, WandbCallback):
            _refuse_watching()
        saves = isinstance(callback, (WandbCallback, DVCLiveCallback)) and _logs_models(callback)
        if saves and isinstance(handler.model, MLXCausalLM) and "on_train_end" not in vars(callback):
            _show_torch(callback, handler.model)


def tracker_links() -> dict[str, str]:
    """Where the trackers show this run: name to URL, of those that are under way (trl 1.16 ``create_model_card``)."""
    runs = {
        "Weights & Biases": getattr(getattr(sys.modules.get("wandb"), "run", None), "url", None),
        "Trackio": _trackio_link(),
        "Comet": getattr(_comet_experiment(), "url", None),
    }
    return {name: url for name, url in runs.items() if url}


def _refuse_watching() -> None:
    asked = os.getenv("WANDB_WATCH", "false")
    if asked in _WATCHED:
        raise SettingError(
            f"WANDB_WATCH={asked}",
            "what wandb sees without hooks in torch's forward and backward passes: MLX computes both",
            "WANDB_WATCH=false; gradients in a callback: def on_pre_optimizer_step(self, args, state, control, model, "
            "**kwargs): wandb.log({n: p.grad.norm() for n, p in model.named_parameters() if p.grad is not None})",
        )


def _logs_models(callback: Any) -> bool:
    asked = getattr(callback, "_log_model", False)
    return bool(getattr(asked, "is_enabled", asked))


def _show_torch(callback: Any, model: MLXCausalLM) -> None:
    if model.tree.missing:
        raise SettingError(
            f"{type(callback).__name__} that logs a model with {model.tree.missing[0]}, which is not held as in torch",
            "a model that transformers' trainer can save",
            "WANDB_LOG_MODEL=false (or HF_DVCLIVE_LOG_MODEL=false), and trainer.save_model(dir)",
        )
    # They print it as it begins, and save it in the end with transformers' own trainer.
    callback.setup = partial(_with_model, callback.setup, lambda model: model.tree.root)
    callback.on_train_end = partial(_with_model, callback.on_train_end, copy.deepcopy)


def _with_model(method: Callable, show: Callable[[Any], Any], *args: Any, **kwargs: Any) -> Any:
    args = tuple(show(value) if isinstance(value, MLXCausalLM) else value for value in args)
    kwargs = {name: show(value) if isinstance(value, MLXCausalLM) else value for name, value in kwargs.items()}
    return method(*args, **kwargs)


def _trackio_link() -> str | None:
    variables = getattr(sys.modules.get("trackio"), "context_vars", None)
    run = variables.current_run.get() if variables is not None else None
    space = getattr(run, "_space_id", None)
    if run is None or space is None:
        return None
    place = space.replace("/", "-")
    return f"https://{place}.hf.space?project={run.project}&runs={run.name}&sidebar=collapsed"


def _comet_experiment() -> Any:
    comet = sys.modules.get("comet_ml")
    return None if comet is None else comet.get_running_experiment()
