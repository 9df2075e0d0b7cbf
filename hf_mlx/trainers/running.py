"""One call of ``train()``, from the checkpoint it goes on from to the metrics of its end."""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..checkpoints.folders import rotate
from ..checkpoints.interrupt import Interrupt
from ..checkpoints.lock import alone_in_output_dir
from ..data.own_loader import OwnLoader
from ..errors import HFMLXError, SettingError
from ..loop.run import Loop
from ..processes.world import is_lost, report_failure
from ..surface.callbacks import make_state
from ..surface.checkpoints import Checkpoints, no_step
from ..surface.estimate import estimate_memory
from ..surface.gradients import Gradients
from ..surface.optimizer import OptimizerView, SchedulerView
from ..surface.report import write_report
from ..surface.requests import no_rows
from ..surface.together import check_alike, check_epochs, join_step
from ..surface.wording import in_its_words
from ..training.command_buffers import wait_for_memory
from ..training.wired_memory import bounded_cache
from .evaluating import Evaluating
from .loaders import LaterLoader
from .refused import NO_SEARCH

logger = logging.getLogger(__name__)


class Running(Evaluating):
    """``train`` and the checkpoints it writes."""

    @in_its_words
    @alone_in_output_dir
    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train to the end of the plan.

        Args:
            resume_from_checkpoint: A checkpoint folder, written here or by transformers' or trl's trainer, or True
                for the newest complete one in ``output_dir``.
            trial: Must stay None: :meth:`hyperparameter_search` is not offered.
            ignore_keys_for_eval: Passed to :meth:`evaluate`.

        Returns:
            ``transformers.trainer_utils.TrainOutput`` with global_step, training_loss and metrics.

        Raises:
            CheckpointError: The checkpoint is not complete, or does not fit this run; nothing was changed.
            TrainingError: The loss became NaN or infinite.
            KeyboardInterrupt: After Ctrl-C, once a checkpoint of the last whole step is saved.
        """
        from transformers.trainer_utils import TrainOutput, align_special_tokens, speed_metrics

        if trial is not None:
            raise SettingError("train(trial=…)", "a run of its own for each trial", NO_SEARCH)
        if self.train_dataset is None:
            raise no_rows(self.recipe.name)
        self._settle(training=True)
        check_alike(self, self.world)
        join_step(self.world, self.plan.batch.gradient_accumulation_steps, self.args.ddp_timeout)
        own_loader = self._own_train_loader()
        self._count_steps(own_loader)
        self._memory.start("train")
        checkpoints = self._checkpoints = Checkpoints(self)
        folder = checkpoints.find(resume_from_checkpoint)
        self._reset_state()
        if self.processing_class is not None:
            align_special_tokens(self.model, self.processing_class)
        logger.info(self.grad_clip.describe())
        start = time.time()
        schedule = self._make_schedule()
        if self._loop is not None:
            schedule.follow(self._loop.schedule)
        self.session.step.carry = None
        loader = own_loader or self.data.train_loader(self.train_dataset)
        check_epochs(self.args, loader)
        handler = self.callback_handler
        # The script's own optimizer is shown as it is: a rate that is set in it is what it steps with.
        view = None if self._brings_optimizer() else self._show_optimizer(schedule)
        handler.optimizer = self.optimizer if view is None else view
        shown = self.lr_scheduler if view is None else SchedulerView(schedule, lambda: loop.steps_done)
        handler.lr_scheduler = shown
        handler.train_dataloader = own_loader.loader if own_loader else LaterLoader(self.get_train_dataloader)
        for callback in handler.callbacks:
            if hasattr(callback, "follow_batches"):
                callback.follow_batches(loader)
        loop = self._loop = self._make_loop(loader, schedule, checkpoints, folder, view)
        self._tokens_before, self.is_in_train = self.state.num_input_tokens_seen, True
        self._recorder.start(self.session.progress.num_tokens)
        try:
            with (
                wait_for_memory(self.plan, lambda: estimate_memory(self).bound),
                bounded_cache(lambda: estimate_memory(self).temporary),
                self._clock.first_step(handler),
                loop.interrupt.held_back(),
            ):
                result = loop.run(start, ignore_keys=ignore_keys_for_eval)
        except BaseException as error:
            self.is_in_train = False
            self._memory.stop("train", {})
            if isinstance(error, KeyboardInterrupt):
                checkpoints.save_interrupted(loop.boundary)
            else:
                report_failure(error)
            # The user's object gets what there is; the reason for stopping is what must be seen.
            with suppress(HFMLXError):
                self._base.write_back()
            write_report(self, error)
            if not self.world.is_alone and isinstance(error, RuntimeError) and is_lost(error):
                raise self.world.lost(f"step {self.state.global_step + 1}") from error
            raise
        self._base.write_back()
        self._asked.say_unread(self.args)
        done = self.state.global_step - loop.first_step
        metrics = speed_metrics("train", start, self._trained_rows(own_loader, done), done)
        metrics |= {"total_flos": self.state.total_flos, **result}
        self._memory.stop("train", metrics)
        self.log(metrics)
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            checkpoints.load_best(self.state.best_model_checkpoint)
            self._base.write_back()
        limited = self.world.is_main and self.args.save_total_limit == 1
        if limited and self.state.best_model_checkpoint is not None:
            # While training the last one is kept beside the best one, to resume from.
            rotate(self.args.output_dir, 1, keep=[self.state.best_model_checkpoint])
        self.control = handler.on_train_end(self.args, self.state, self.control)
        self.hub.finish()
        self.is_in_train = False
        write_report(self)
        return TrainOutput(self.state.global_step, result["train_loss"], metrics)

    def save_checkpoint(self) -> None:
        """Write ``checkpoint-{global_step}`` into ``output_dir``, in transformers' layout.

        Raises:
            CheckpointError: It cannot be written, or no step was made yet. Earlier checkpoints are as they were.
        """
        if self._loop is None or self._checkpoints is None:
            raise no_step()
        if "trl" in self.recipe.tags and self.world.is_main:
            # As trl 1.16 ``_save_checkpoint``; transformers' trainer writes none.
            self.create_model_card(
                model_name=(self.args.hub_model_id or Path(self.args.output_dir).name).split("/")[-1]
            )
        folder = self._checkpoints.save(self._loop.boundary, self._loop.schedule)
        if self.args.push_to_hub and self.world.is_main:
            self.callback_handler.on_push_begin(self.args, self.state, self.control)
            self.hub.push_checkpoint(folder, self.state.global_step, self.state.epoch)

    def adopt_additions(self) -> None:
        """Take what callbacks put into the checkpoint just written for a part of it."""
        if self._checkpoints is not None and self.world.is_main:
            self._checkpoints.store.adopt_additions(self.state.global_step)

    def _make_loop(
        self, loader: Any, schedule: Any, checkpoints: Checkpoints, folder: Path | None, view: OptimizerView | None
    ) -> Loop:
        """The loop of this call; from ``folder`` on, once everything in it is known to fit."""
        boundary = checkpoints.restore(folder, schedule) if folder is not None else None
        self._interrupt = Interrupt(is_shared=not self.world.is_alone)
        gradients = Gradients(self._base, self.callback_handler)
        loop = Loop(self, self.session, self.data, loader, self.steps, schedule, self._interrupt, view, gradients)
        if boundary is not None:
            loop.resume(boundary)
        return loop

    def _show_optimizer(self, schedule: Any) -> OptimizerView:
        step = self.session.step
        decayed = step.optimizer.decay & step.params.keys()
        plain = step.params.keys() - decayed
        return OptimizerView(
            step.optimizer,
            schedule,
            lambda which: self._base.parameters(decayed if which else plain),
            (len(decayed), len(plain)),
        )

    def _reset_state(self) -> None:
        self.state = make_state(self.callback_handler, self.control, self.world)
        self.state.train_batch_size = self.plan.batch.train_batch_size
        self.state.compute_steps(self.args, self.steps.total_steps)
        self.state.max_steps, self.state.num_train_epochs = self.steps.total_steps, self.steps.epochs

    def _trained_rows(self, own_loader: OwnLoader | None, done: int) -> float:
        plan, steps = self.plan.batch, self.steps
        if plan.max_steps > 0:
            rows = steps.total_steps * self.get_total_train_batch_size(self.args)
        else:
            of_epoch = len(self.train_dataset) if own_loader is None else self.num_examples(own_loader.loader)
            rows = of_epoch * plan.num_train_epochs
        return rows * done / max(steps.total_steps, 1)
