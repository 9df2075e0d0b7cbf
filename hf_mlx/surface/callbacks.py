"""transformers' own callbacks, handler and state, set up as ``transformers.Trainer.__init__`` does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..processes.world import World
from .trackers import prepare_trackers
from .writes import follow_events


def make_handler(
    args: Any,
    callbacks: list | None,
    *,
    model: Any,
    tokenizer: Any,
    before: Callable[[str], None],
    after: Callable[[str], None],
) -> tuple[Any, Any]:
    """A ``CallbackHandler`` with HF's default, reporting, the user's and the progress callbacks, in HF's order.

    Args:
        args: ``TrainingArguments``.
        callbacks: The user's.
        model: What callbacks get as ``model``.
        tokenizer: What they get as ``processing_class``.
        before, after: As for :func:`~hf_mlx.surface.writes.follow_events`.

    Returns:
        The handler and a fresh ``TrainerControl``.

    Raises:
        SettingError: A tracker is asked for what no step here can show it.
    """
    from transformers.integrations import get_reporting_integration_callbacks
    from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback, PrinterCallback, TrainerControl

    chosen = [DefaultFlowCallback, *get_reporting_integration_callbacks(args.report_to), *(callbacks or [])]
    handler = CallbackHandler(chosen, model, tokenizer, None, None)
    handler.add_callback(PrinterCallback if args.disable_tqdm else progress_callback())
    prepare_trackers(handler)
    follow_events(handler, before, after)
    return handler, TrainerControl()


def make_state(handler: Any, control: Any, world: World) -> Any:
    """A fresh ``TrainerState`` that carries the state of the callbacks that have one, and says which process it is."""
    from transformers.trainer_callback import ExportableState, TrainerState

    carriers = (*handler.callbacks, control)
    stateful: list[Any] = [callback for callback in carriers if isinstance(callback, ExportableState)]
    return TrainerState(
        is_local_process_zero=world.is_local_main, is_world_process_zero=world.is_main, stateful_callbacks=stateful
    )


def progress_callback() -> type:
    """HF's progress bar: the notebook's in a notebook, the terminal's elsewhere."""
    from transformers.utils import is_in_notebook

    if is_in_notebook():
        from transformers.utils.notebook import NotebookProgressCallback

        return NotebookProgressCallback
    from transformers.trainer_callback import ProgressCallback

    return ProgressCallback
