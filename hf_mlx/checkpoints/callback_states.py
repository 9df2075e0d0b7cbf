"""The state of callbacks that have one: into a checkpoint, and back into the callbacks of a resumed run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger(__name__)


def collect_states(handler: Any, control: Any) -> dict[str, Any]:
    """``TrainerState.stateful_callbacks`` as of now: {class name: state, or a list of them}."""
    from transformers.trainer_callback import ExportableState, TrainerState

    stateful = [callback for callback in (*handler.callbacks, control) if isinstance(callback, ExportableState)]
    return TrainerState(stateful_callbacks=stateful).stateful_callbacks  # pyright: ignore[reportReturnType, reportArgumentType]


def restore_states(handler: Any, control: Any, stored: Mapping[str, Any]) -> Any:
    """Replace the callbacks that have a stored state by new ones in that state, each in its own place.

    Args:
        handler: The callback handler; its list is changed.
        control: The trainer's control.
        stored: ``stateful_callbacks`` of the checkpoint.

    Returns:
        The control to go on with.
    """
    revived: dict[int, Any] = {}
    for name, states in (stored or {}).items():
        states = list(states) if isinstance(states, list) else [states]
        if type(control).__name__ == name:
            control = _revive(control, states[0])
            continue
        places = [i for i, callback in enumerate(handler.callbacks) if type(callback).__name__ == name]
        if not places:
            logger.warning(f"The checkpoint holds the state of {name}, which is not among this run's callbacks.")
        for place, state in zip(places, states, strict=False):
            revived[place] = _revive(handler.callbacks[place], state)
    # Once all of them are known to come back.
    for place, callback in revived.items():
        handler.callbacks[place] = callback
    return control


def _revive(callback: Any, state: Mapping[str, Any]) -> Any:
    revived = type(callback)(**state.get("args", {}))
    for attribute, value in state.get("attributes", {}).items():
        setattr(revived, attribute, value)
    return revived
