"""Weights that a callback or script wrote: looked for in what was handed out, and taken over before the next step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import TrainingError
from ..models.torch_arrays import to_mlx
from ..session import Session

# Events within an optimizer step: the window is computed as one afterwards, so weights written here come too early.
_WITHIN = ("on_substep_end", "on_pre_optimizer_step", "on_prediction_step")


def differs(tensor: Any, array: mx.array) -> bool:
    """Whether a torch tensor (or MLX array) holds other bits than ``array``."""
    mine = tensor if isinstance(tensor, mx.array) else to_mlx(tensor)
    if mine is array:
        return False
    if mine.shape != array.shape:
        return True
    array = array.astype(mine.dtype)
    return not np.array_equal(_bits(mine), _bits(array))


def _bits(array: mx.array) -> np.ndarray:
    return np.array(mx.contiguous(array).reshape(-1).view(mx.uint8), copy=False)


def take_over(session: Session, written: Mapping[str, mx.array]) -> None:
    """Go on from other weights; the optimizer's moments stay, as upstream's do.

    Args:
        session: Trains them.
        written: MLX name to array, in the dtype that is trained; any subset.
    """
    step = session.step
    cast = {name: value.astype(step.params[name].dtype) for name, value in written.items()}
    mx.eval(cast)
    step.load({**step.params, **cast}, step.state)


def refuse_within(event: str | None, name: str) -> None:
    """Refuse weights written where the step would not see them in time.

    Raises:
        TrainingError: The event lies within an optimizer step or an evaluation.
    """
    if event in _WITHIN:
        raise TrainingError(
            f"{name} written in {event}",
            "weights that stay as they are within a step and within an evaluation: both are computed as one here",
            "write them in on_step_begin or on_step_end",
        )


def refuse_toggled(name: str, trains: bool, event: str | None) -> None:
    """Refuse a parameter that was frozen or released while training.

    Raises:
        TrainingError: Always.
    """
    raise TrainingError(
        f"requires_grad={trains} set on {name}{f' in {event}' if event else ''}",
        "the same trained parameters from the trainer's constructor to the end of train(): the step is compiled for "
        "them",
        "train in two runs: set requires_grad (or LoraConfig), train, then a second MLXSFTTrainer on the trained model",
    )


def refuse_frozen(name: str, event: str | None) -> None:
    """Refuse a write into what is not trained.

    Raises:
        TrainingError: Always.
    """
    raise TrainingError(
        f"{name}, which is not trained, written{f' in {event}' if event else ' by the script'}",
        "frozen weights as they were when the trainer was made: the compiled step holds them",
        "change them before the trainer is made, or train them",
    )


def follow_events(handler: Any, before: Callable[[str], None], after: Callable[[str], None]) -> None:
    """Call ``before`` and ``after`` around each event in which a callback may look at the weights.

    Args:
        handler: ``transformers.CallbackHandler``; followed on this instance.
        before: Makes what the callbacks see current.
        after: Takes over what they wrote.
    """
    fire = handler.call_event

    def call_event(event: str, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        # What was written between two events, by metrics or by the script, is looked for before the next step.
        looked = any(may_look(type(callback), event) for callback in handler.callbacks)
        if looked or event in ("on_train_begin", "on_step_begin"):
            after("")
        if not looked:
            return fire(event, args, state, control, **kwargs)
        before(event)
        try:
            return fire(event, args, state, control, **kwargs)
        finally:
            after(event)

    handler.call_event = call_event


def may_look(callback: type, event: str) -> bool:
    """Whether a callback of this class may read or write weights in ``event``."""
    # transformers' own read the config alone, but for those that upload the model at the end or with a checkpoint.
    if callback.__module__.startswith("transformers."):
        return event in ("on_save", "on_train_end") and not callback.__module__.startswith(_NEVER_READ)
    return any(event in vars(owner) for owner in callback.__mro__ if owner.__name__ != "TrainerCallback")


_NEVER_READ = ("transformers.trainer_callback", "transformers.utils.notebook")
