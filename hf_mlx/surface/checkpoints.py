"""The checkpoints of one call of ``train()``: where it resumes from, and what it saves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..checkpoints.boundary import Boundary, make_layout
from ..checkpoints.callback_states import collect_states, restore_states
from ..checkpoints.damage import FILES
from ..checkpoints.random_states import RandomStates
from ..checkpoints.sharing import SharedFolder
from ..checkpoints.store import CheckpointStore
from ..checkpoints.trainer_state import load_trainer_state
from ..errors import CheckpointError, HFMLXError
from ..processes.world import World
from ..training.optimizers.contract import Arrays

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
        self.world: World = trainer.world
        dataset = trainer.train_dataset
        rows = len(dataset) if hasattr(dataset, "__len__") else None
        layout = make_layout(trainer.steps, trainer.plan.batch)
        self.store = CheckpointStore(trainer.args, trainer.session, trainer.data, rows, layout)

    def find(self, asked: str | bool | None) -> Path | None:
        """The folder that ``resume_from_checkpoint`` means, of several processes on the machine of the first."""
        if self.world.is_alone:
            return self.store.find(asked)

        def find() -> str | None:
            folder = self.store.find(asked)
            return None if folder is None else str(folder)

        found = self._on_main(find, "the checkpoint to go on from")
        return None if found is None else Path(found)

    def load_best(self, folder: str) -> None:
        """Put the weights of the best checkpoint into the model."""
        step = self._trainer.session.step
        with self._shared(Path(folder)) as path, step.joined("the best checkpoint"):
            self.store.load_best(path)
            mx.eval(step.params)

    def _on_main(self, run: Callable[[], Any], what: str) -> Any:
        """What ``run`` returns on the first process, in JSON; its error is raised on all of them."""
        said: dict[str, Any] = {}
        if self.world.is_main:
            try:
                said["value"] = run()
            except HFMLXError as error:
                said["error"] = [error.received, error.required, error.remedy]
        said = self.world.hand_on(said, what)
        if "error" in said:
            raise CheckpointError(*said["error"])
        return said["value"]

    @contextmanager
    def _shared(self, folder: Path) -> Iterator[Path]:
        if self.world.is_alone:
            yield folder
            return
        shared = SharedFolder(folder, self.world)
        try:
            yield shared.path
        finally:
            shared.close()

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
        step = self._trainer.session.step
        with self._shared(folder) as path, step.joined("the checkpoint to go on from"):
            boundary = self._restore(path, schedule)
            # The files may be a copy that is about to go.
            mx.eval(step.params, step.state)
        if not self.world.is_alone:
            self._share_state(boundary)
        return boundary

    def _share_state(self, boundary: Boundary) -> None:
        """What only the first process knows, or is to count."""
        state = self._trainer.state
        state.best_model_checkpoint = self.world.hand_on(state.best_model_checkpoint, "the best checkpoint")
        state.is_world_process_zero, state.is_local_process_zero = self.world.is_main, self.world.is_local_main
        split = self._trainer.session.split
        if boundary.carry is not None and split is not None:
            grads, sums = boundary.carry
            boundary.carry = split.cut_gradients(grads), sums
        elif boundary.carry is not None and not self.world.is_main:
            grads, sums = boundary.carry
            counted = {"micro_batches": sums["micro_batches"]}
            boundary.carry = _zeros(grads), {**_zeros(sums), **counted}

    def _restore(self, folder: Path, schedule: Any) -> Boundary:
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
        callbacks = collect_states(trainer.callback_handler, trainer.control)

        write = trainer._write_checkpoint
        if self.world.is_alone:
            return self.store.save(trainer.state, boundary, schedule, callbacks, write)
        random = []
        if trainer.session.split is None:
            packed = self.world.gather_object(boundary.random.pack(), "the random states of a checkpoint")
            random = [RandomStates.unpack(states) for states in packed]
        if boundary.carry is not None:
            boundary = replace(boundary, carry=self._sum_carry(*boundary.carry))

        def save() -> list[str | None]:
            folder = self.store.save(trainer.state, boundary, schedule, callbacks, write, random)
            return [str(folder), trainer.state.best_model_checkpoint]

        with trainer.session.step.joined("a checkpoint"):
            folder, best = self._on_main(save, "a checkpoint that rank 0 writes")
        trainer.state.stateful_callbacks, trainer.state.best_model_checkpoint = callbacks, best
        return Path(folder)

    def _sum_carry(self, grads: Arrays, sums: Arrays) -> tuple[Arrays, Arrays]:
        counted = {"micro_batches": sums["micro_batches"]}
        what = "the gradients of a checkpoint"
        if (split := self._trainer.session.split) is not None:
            return split.join_gradients(grads, what), sums
        return self.world.sum(grads, what), {**self.world.sum(sums, what), **counted}

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


def _zeros(arrays: Arrays) -> Arrays:
    return {name: mx.zeros_like(array) for name, array in arrays.items()}


def no_step() -> CheckpointError:
    """What saving raises while there is no state between two steps to go on from."""
    return CheckpointError(
        "save_checkpoint() outside of training, or in the middle of a step",
        "a step that was made, to go on from",
        "trainer.save_model(dir) for the weights alone",
    )
