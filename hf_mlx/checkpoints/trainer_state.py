"""trainer_state.json, exactly with the keys of transformers' TrainerState."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .inspection import STATE, read_trainer_state

logger = logging.getLogger(__name__)

# As upstream the checkpoint's value goes on; transformers 5.23 Trainer, compare_trainer_and_checkpoint_args.
_KEPT = ("logging_steps", "eval_steps", "save_steps")


def write_trainer_state(state: Any, path: Path, **changes: Any) -> None:
    """Write ``state`` with ``changes`` as JSON, in the form of ``TrainerState.save_to_json``."""
    content = dataclasses.asdict(state) | changes
    path.write_text(json.dumps(content, indent=2, sort_keys=True, default=_to_number) + "\n", encoding="utf-8")


def load_trainer_state(folder: Path, fresh: Any) -> Any:
    """The TrainerState of a checkpoint for a run whose own would be ``fresh``.

    Raises:
        CheckpointError: The file is not readable, or holds keys that TrainerState does not have.
    """
    content = read_trainer_state(folder)
    unknown = sorted(set(content) - {field.name for field in dataclasses.fields(fresh)})
    if unknown:
        raise CheckpointError(
            f"{folder / STATE}: unknown keys {', '.join(unknown[:3])}",
            "the keys of transformers' TrainerState",
            "the version of transformers that wrote it: pip install -U transformers",
        )
    state = type(fresh)(**content)
    changed = [name for name in _KEPT if getattr(state, name) != getattr(fresh, name)]
    if changed:
        lines = ", ".join(f"{name}={getattr(state, name)} (not {getattr(fresh, name)})" for name in changed)
        logger.warning(f"The checkpoint's own settings go on, as in transformers: {lines}.")
    if state.best_model_checkpoint is not None and not Path(state.best_model_checkpoint).is_dir():
        logger.warning(f"The best checkpoint, {state.best_model_checkpoint}, is not there any more.")
        state.best_model_checkpoint = None
    state.max_steps, state.num_train_epochs = fresh.max_steps, fresh.num_train_epochs
    return state


def _to_number(value: Any) -> Any:
    # Metrics of users' functions are often numpy or torch scalars.
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} in the trainer's state")
