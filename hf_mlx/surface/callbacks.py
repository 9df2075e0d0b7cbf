"""transformers' own callbacks, handler and state, set up as ``transformers.Trainer.__init__`` does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def make_handler(
    args: Any, callbacks: list | None, *, model: Any, tokenizer: Any, refresh: Callable[[], None] | None = None
) -> tuple[Any, Any]:
    """A ``CallbackHandler`` with HF's default, reporting, the user's and the progress callbacks, in HF's order.

    Args:
        args: ``TrainingArguments``.
        callbacks: The user's.
        model: What callbacks get as ``model``.
        tokenizer: What they get as ``processing_class``.
        refresh: Called before an event that a callback may read the model's weights in.

    Returns:
        The handler and a fresh ``TrainerControl``.
    """
    from transformers.integrations import get_reporting_integration_callbacks
    from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback, PrinterCallback, TrainerControl

    chosen = [DefaultFlowCallback, *get_reporting_integration_callbacks(args.report_to), *(callbacks or [])]
    handler = CallbackHandler(chosen, model, tokenizer, None, None)
    handler.add_callback(PrinterCallback if args.disable_tqdm else progress_callback())
    if refresh is not None:
        _refresh_before_reads(handler, refresh)
    return handler, TrainerControl()


def _refresh_before_reads(handler: Any, refresh: Callable[[], None]) -> None:
    fire = handler.call_event

    def call_event(event: str, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if any(_may_read_weights(type(callback), event) for callback in handler.callbacks):
            refresh()
        return fire(event, args, state, control, **kwargs)

    handler.call_event = call_event


def _may_read_weights(callback: type, event: str) -> bool:
    # transformers' own read the config alone, but for those that upload the model at the end or with a checkpoint.
    if callback.__module__.startswith("transformers."):
        return event in ("on_save", "on_train_end") and not callback.__module__.startswith(_NEVER_READ)
    return any(event in vars(owner) for owner in callback.__mro__ if owner.__name__ != "TrainerCallback")


_NEVER_READ = ("transformers.trainer_callback", "transformers.utils.notebook")


def make_state(handler: Any, control: Any) -> Any:
    """A fresh ``TrainerState`` that carries the state of the callbacks that have one."""
    from transformers.trainer_callback import ExportableState, TrainerState

    carriers = (*handler.callbacks, control)
    stateful: list[Any] = [callback for callback in carriers if isinstance(callback, ExportableState)]
    return TrainerState(stateful_callbacks=stateful)


def progress_callback() -> type:
    """HF's progress bar: the notebook's in a notebook, the terminal's elsewhere."""
    from transformers.utils import is_in_notebook

    if is_in_notebook():
        from transformers.utils.notebook import NotebookProgressCallback

        return NotebookProgressCallback
    from transformers.trainer_callback import ProgressCallback

    return ProgressCallback
