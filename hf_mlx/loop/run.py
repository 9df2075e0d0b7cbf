"""The loop itself: epochs, windows of micro-batches, optimizer steps."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

from ..checkpoints.boundary import Boundary
from ..checkpoints.interrupt import Interrupt
from ..data.collate import Batch
from ..data.order import Steps
from ..errors import DataError, TrainingError
from ..feed import Feed, Loader
from ..processes.world import World
from ..session import Session
from ..training.inputs import Inputs
from ..training.memory import show_bytes
from ..training.schedules.contract import Schedule
from ..training.shortage import describe_training, naming_shortage
from ..training.splitting import choose_computation
from ..training.step import StepMetrics
from ..training.wired_memory import wired_memory
from .actions import Actions
from .counters import count_micro_batch
from .host import GradientLoan, Host, Rates, fire
from .pending import Pending
from .place import Place
from .windows import open_windows

logger = logging.getLogger(__name__)


class Loop:
    """Runs one call of ``train()`` and reports to its host.

    Args:
        host: The trainer; its HF objects (args, state, control, callbacks) are used as they are.
        session: Model, step and counters.
        data: Turns batches into device arrays.
        loader: Micro-batches by epoch.
        steps: Counts of the run.
        schedule: Learning rate by step.
        interrupt: Looked at between two steps.
        rates: What callbacks see as the optimizer, if they see one.
        gradients: Shows the gradients to callbacks, if any may look.

    Attributes:
        first_step: Step that this call began after.
    """

    def __init__(
        self,
        host: Host,
        session: Session,
        data: Feed,
        loader: Loader,
        steps: Steps,
        schedule: Schedule,
        interrupt: Interrupt | None = None,
        rates: Rates | None = None,
        gradients: GradientLoan | None = None,
    ) -> None:
        self.host = host
        self.session = session
        self.data = data
        self.loader = loader
        self.steps = steps
        self.schedule = schedule
        self._rates = rates
        self._gradients = gradients
        self.plan = session.plan
        self.compute = choose_computation(session.step, self.plan, host.model.config)
        self.first_step = host.state.global_step
        self.world = session.world
        self._pad_token_id = getattr(data.tokenizer, "pad_token_id", None)
        self.interrupt = interrupt or Interrupt(is_shared=not self.world.is_alone)
        self._place = place = Place(host, session, data, steps)
        self._pending = Pending(session, self.first_step, lambda step: schedule.lr(step - 1 - place.offset))
        self._act = Actions(host, place, self._pending, schedule, self.interrupt)

    @property
    def boundary(self) -> Boundary | None:
        """The last moment between two steps that the run can go on from; None while a step is under way."""
        return self._place.boundary

    @property
    def steps_done(self) -> int:
        """Optimizer steps that the schedule has seen."""
        return self.host.state.global_step - self._place.offset

    def resume(self, boundary: Boundary) -> None:
        """Go on from ``boundary`` instead of beginning."""
        self._place.resume(boundary)
        self._pending.resume(boundary.pending, boundary.last_logged)

    def run(self, start_time: float, *, ignore_keys: list[str] | None = None) -> dict[str, float]:
        """Train to the end of the plan.

        Returns:
            ``{"train_loss": …}``: the mean loss of the steps of this call.

        Raises:
            TrainingError: The loss became NaN or infinite (while ``logging_nan_inf_filter`` is on).
        """
        host = self.host
        self._act.start_time, self._act.ignore_keys = start_time, ignore_keys
        model = self.session.loaded.model
        model.train()
        with wired_memory():
            try:
                self._run_epochs()
            finally:
                model.eval()
            self._pending.drain(own=True)
        logger.info(f"{self.session.describe_shapes()}; at most {show_bytes(mx.get_peak_memory())} were held at once")
        return {"train_loss": self._pending.total_loss / max(host.state.global_step - self.first_step, 0.001)}

    def _run_epochs(self) -> None:
        host = self.host
        if self._rates is not None:
            self._rates.show(self.schedule.lr(self.steps_done))
        fire(self.host, "on_train_begin")
        resumed = self._place.resumed
        if host.args.eval_on_start and resumed is None:
            host.evaluate(ignore_keys=self._act.ignore_keys)
        first_epoch = 0 if resumed is None else resumed.epoch
        done = 0 if resumed is None or host.args.ignore_data_skip else resumed.update
        if resumed is not None and resumed.phase == "ended":
            self._place.end_epoch_again(resumed)
            self._act.catch_up(resumed)
            first_epoch, done = resumed.epoch + 1, 0
        for epoch in range(first_epoch, self.steps.epochs):
            if resumed is not None and (host.control.should_training_stop or (done == 0 and self._is_finished())):
                break
            fire(self.host, "on_epoch_begin")
            self._run_epoch(epoch, done)
            done = 0
            if host.control.should_training_stop:
                break

    def _is_stopped(self) -> bool:
        return self.host.control.should_epoch_stop or self.host.control.should_training_stop

    def _is_finished(self) -> bool:
        return self.host.state.global_step >= self.host.state.max_steps

    def _run_epoch(self, epoch: int, done: int) -> None:
        host = self.host
        windows = open_windows(self._place.open_epoch(self.loader, epoch, done), self)
        micro = done * self.plan.batch.gradient_accumulation_steps
        stopped = False
        if self._place.resumed is not None:
            self._act.catch_up(self._place.resumed)
            stopped = self._is_stopped()
        for update in range(done, self.steps.updates_per_epoch):
            # Upstream looks only after a micro-batch: a stop that was asked for before the first lets it pass.
            if stopped:
                break
            size = self._window_size(update)
            window = windows.take(size, self._window_size(update + 1))
            if not window:
                break
            micro += len(window)
            fire(self.host, "on_step_begin")
            inputs = [item for _, item in window]
            trained = self._announce_substeps(window)
            ran_out = len(window) < size and micro < self.steps.batches_per_epoch
            if trained < len(window) or ran_out:
                # A callback stopped, or a stream ended, inside a window: upstream keeps the gradients for the next.
                with self._computing(inputs):
                    self.compute.accumulate(inputs, trained)
                if trained == len(window):
                    fire(self.host, "on_substep_end")
                    _check_steps(update, micro, self.plan.batch.gradient_accumulation_steps)
                break
            self._optimize(inputs)
            host.state.epoch = epoch + micro / self.steps.batches_per_epoch
            self._place.update = update + 1
            self._place.mark(self._pending, "stepped")
            fire(self.host, "on_step_end")
            self._act()
            # Several processes agree on a stop that is not the plan's own, before they take the next window.
            stopped = self._is_stopped() and (self.world.is_alone or self._is_finished())
        if micro == 0 and (self.world.is_alone or not self._is_stopped()):
            warnings.warn(
                f"the dataset ran out at step {host.state.global_step} of {host.state.max_steps}; training stops here",
                stacklevel=2,
            )
            host.control.should_training_stop = True
        fire(self.host, "on_epoch_end")
        self._act("ended")
        windows.end()

    def _window_size(self, update: int) -> int:
        """Micro-batches of an epoch's window; 0 after the last."""
        accumulation, last = self.plan.batch.gradient_accumulation_steps, self.steps.updates_per_epoch - 1
        if update > last:
            return 0
        return (self.steps.batches_per_epoch - 1) % accumulation + 1 if update == last else accumulation

    def _announce_substeps(self, window: list[tuple[Batch, Inputs]]) -> int:
        """Count the micro-batches and fire ``on_substep_end`` after all but the last.

        Returns:
            How many are to be trained: fewer than there are when a callback asked to stop between two.
        """
        for number, (batch, inputs) in enumerate(window, 1):
            count_micro_batch(self.host, self.session, batch, inputs, self._pad_token_id)
            if number < len(window):
                fire(self.host, "on_substep_end")
                if self._is_stopped():
                    _check_alone(self.world)
                    return number
        return len(window)

    def _optimize(self, window: list[Inputs]) -> None:
        host, place = self.host, self._place
        made = host.state.global_step - place.offset
        place.learning_rate = self.schedule.lr(made)
        step = self.session.step
        if self._gradients is not None and self._gradients.are_wanted:
            with self._computing(window):
                metrics = self._optimize_shown(window, self._gradients)
        else:
            fire(self.host, "on_pre_optimizer_step")
            rate = self._take_rate()
            place.boundary = None
            with self._computing(window):
                metrics = self.compute(window, step.updates + 1, rate)
        step.updates += 1
        fire(self.host, "on_optimizer_step")
        self.schedule.advance()
        host.state.global_step += 1
        if self._rates is not None:
            self._rates.show(self.schedule.lr(made + 1))
        self._pending.append(metrics, window)
        every = self.plan.clear_cache_steps
        if every and host.state.global_step % every == 0:
            mx.clear_cache()

    def _optimize_shown(self, window: list[Inputs], gradients: GradientLoan) -> StepMetrics:
        """The step in two halves: callbacks see the gradients in between, and may write them."""
        step = self.session.step
        self.compute.accumulate(window, len(window))
        grads, sums = step.collect()
        gradients.lend(grads)
        try:
            fire(self.host, "on_pre_optimizer_step")
        finally:
            written = gradients.take()
        rate = self._take_rate()
        self._place.boundary = None
        return step.apply({**grads, **written}, sums, step.updates + 1, rate)

    def _take_rate(self) -> float:
        """The learning rate of the step, which a callback may have set."""
        scheduled = self._place.learning_rate
        if self._rates is None or (rate := self._rates.rate(scheduled)) == scheduled:
            return scheduled
        self.schedule.take_rate(rate)
        self._place.learning_rate = self.schedule.lr(self.steps_done)
        return rate

    @contextmanager
    def _computing(self, window: list[Inputs]) -> Iterator[None]:
        """Where work on ``window`` fails, nothing of it stays; out of memory is said as what to write."""
        step, number, config = self.session.step, self.host.state.global_step + 1, self.host.model.config
        held = step.hold()
        try:
            with (
                # MLX may wait for what is under way before it takes more.
                self.world.waiting(f"step {number}", computes=True),
                naming_shortage(lambda: describe_training(step, self.plan, config, number, window)),
            ):
                yield
        except BaseException:
            step.restore(held)
            raise


def _check_steps(update: int, micro: int, accumulation: int) -> None:
    if update == 0:
        raise DataError(
            f"a stream that ends after {micro} micro-batch(es), with gradient_accumulation_steps={accumulation}",
            "a whole step in an epoch: upstream begins to count anew with each, and reads the stream for ever",
            f"gradient_accumulation_steps={micro}, or a stream that repeats its rows: rows.repeat(None)",
        )


def _check_alone(world: World) -> None:
    if not world.is_alone:
        raise TrainingError(
            "a callback that asked to stop in on_substep_end, between two micro-batches of a step",
            "on several processes, a stop between two steps: the others are in the middle of this one",
            "set control.should_training_stop in on_step_end",
        )
