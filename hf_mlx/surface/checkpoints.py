"""The checkpoints of one call of ``train()``: where it resumes from, and what it saves."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ..checkpoints.boundary import Boundary, make_layout
from ..checkpoints.callback_states import collect_states, restore_states
from ..checkpoints.damage import FILES
from ..checkpoints.store import CheckpointStore
from ..checkpoints.trainer_state import load_trainer_state
from ..errors import CheckpointError, HFMLXError

logger = logging.getLogger(__name__)


class Checkpoints:
    """Moves a trainer's state into ``checkpoint-N`` folders and back.

    Args:
        trainer: An :class:`~hf_mlx.MLXSFTTrainer`; its session, state, control and callbacks are read when needed.

    Attributes:
        store: Writes and reads the folders.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        dataset = trainer.train_dataset
        rows = len(dataset) if hasattr(dataset, "__len__") else None
        layout = make_layout(trainer.steps, trainer.plan.batch)
        self.store = CheckpointStore(trainer.args, trainer.session, trainer.data, rows, layout)

    def restore(self, folder: Path, schedule: Any) -> Boundary:
        """Bring the trainer to where ``folder`` was written, once everything in it is known to fit.

        Args:
            folder: A complete checkpoint.
            schedule: The run's schedule; takes on the checkpoint's state.

        Returns:
            Where the loop goes on from.

        Raises:
            CheckpointError: It does not fit this run; nothing was changed.
        """
        trainer = self._trainer
        state = load_trainer_state(folder, trainer.state)
        loaded = self.store.load(folder)
        with FILES.understood(folder, "the states of this run's schedule and callbacks"):
            if loaded.schedule is not None:
                schedule.load_state_dict(loaded.schedule)
            if trainer.args.restore_callback_states_from_checkpoint:
                trainer.control = restore_states(trainer.callback_handler, trainer.control, state.stateful_callbacks)
        if loaded.schedule is not None and (note := schedule.describe_resumed()):
            logger.warning(note)
        trainer.state = state
        step = trainer.session.step
        trainer.session.adopt_frozen(loaded.frozen)
        step.load(loaded.weights, loaded.moments or step.state)
        if loaded.own_optimizer is not None:
            step.optimizer.torch.load_state_dict(loaded.own_optimizer)
        if loaded.updates is not None:
            step.updates = loaded.updates
        trainer._read_checkpoint(folder)
        logger.info(f"Resuming from {folder} at step {state.global_step}.")
        return loaded.boundary

    def save(self, boundary: Boundary | None, schedule: Any) -> Path:
        """Write ``checkpoint-{global_step}``, in transformers' layout.

        Args:
            boundary: Where the loop stands; None in the middle of a step.
            schedule: The run's schedule.

        Raises:
            CheckpointError: It cannot be written, or no step was made yet. Earlier checkpoints are as they were.
        """
        if boundary is None:
            raise no_step()
        trainer = self._trainer
        return self.store.save(
            trainer.state,
            boundary,
            schedule,
            collect_states(trainer.callback_handler, trainer.control),
            trainer._write_checkpoint,
        )

    def save_interrupted(self, boundary: Boundary | None) -> None:
        """After Ctrl-C: keep what there is, and say how to go on."""
        step = self._trainer.state.global_step
        if step == 0 or boundary is None:
            logger.warning("Interrupted before a step was whole: no checkpoint was written.")
            return
        try:
            self._trainer.save_checkpoint()
        except HFMLXError as error:
            logger.error(f"Interrupted at step {step}; its checkpoint could not be written.\n{error}")
            return
        logger.warning(
            f"Interrupted at step {step}, saved as checkpoint-{step}: "
            "trainer.train(resume_from_checkpoint=True) goes on from there."
        )


def no_step() -> CheckpointError:
    """What saving raises while there is no state between two steps to go on from."""
    return CheckpointError(
        "save_checkpoint() outside of training, or in the middle of a step",
        "a step that was made, to go on from",
        "trainer.save_model(dir) for the weights alone",
    )
