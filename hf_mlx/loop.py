"""One run: windows of micro-batches, callbacks, logs, evaluation and saving, in transformers' order.

The reference for every event and every logged value is transformers 5.23 ``Trainer._inner_training_loop``
and ``_run_epoch``, with the metrics of trl 1.16 ``SFTTrainer.compute_loss`` and ``log``.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, Protocol

import mlx.core as mx

from .checkpoints.boundary import ACTIONS, Boundary, make_layout
from .checkpoints.interrupt import Interrupt
from .checkpoints.random_states import RandomStates
from .data.collate import Batch
from .data.loader import RowLoader, StreamLoader
from .data.order import Steps
from .errors import TrainingError
from .session import Data, Means, Progress, Session
from .training.inputs import HostInputs, Inputs
from .training.memory import show_bytes
from .training.schedules.contract import Schedule
from .training.shortage import describe_training, naming_shortage
from .training.splitting import choose_computation
from .training.step import StepMetrics
from .training.undefined import settle_undefined
from .training.wired_memory import wired_memory

logger = logging.getLogger(__name__)


class Host(Protocol):
    """What the loop asks of the trainer, so that a subclass may override any of it."""

    args: Any
    state: Any
    control: Any
    callback_handler: Any

    @property
    def model(self) -> Any: ...
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None: ...
    def evaluate(self, *, ignore_keys: list[str] | None = None) -> dict[str, float]: ...
    def save_checkpoint(self) -> None: ...
    def adopt_additions(self) -> None: ...


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

    Attributes:
        boundary: The last moment between two steps that the run can go on from; None while a step is under way.
        first_step: Step that this call began after.
    """

    boundary: Boundary | None = None

    def __init__(
        self,
        host: Host,
        session: Session,
        data: Data,
        loader: RowLoader | StreamLoader,
        steps: Steps,
        schedule: Schedule,
        interrupt: Interrupt | None = None,
    ) -> None:
        self.host = host
        self.session = session
        self.data = data
        self.loader = loader
        self.steps = steps
        self.schedule = schedule
        self.plan = session.plan
        self.interrupt = interrupt or Interrupt()
        self.compute = choose_computation(session.step, self.plan, host.model.config)
        self._resumed: Boundary | None = None
        self._offset = 0
        self._epoch = self._update = 0
        self._epoch_order: dict[str, Any] | None = None
        self._learning_rate = 0.0
        self._pending: list[StepMetrics] = []
        self._checked = 0
        self._warned = False
        self._total_loss = self._unfinite = 0.0
        self._last_logged = host.state.global_step
        self.first_step = host.state.global_step

    def resume(self, boundary: Boundary) -> None:
        """Go on from ``boundary`` instead of beginning."""
        self._resumed, self._offset = boundary, boundary.offset
        self._last_logged, self._learning_rate = boundary.last_logged, boundary.learning_rate
        self._pending = [StepMetrics(*(mx.array(value) for value in step)) for step in boundary.pending]
        self._checked = len(self._pending)
        # The mean loss of this call leaves out what an earlier one trained.
        self._total_loss = -sum(step[0] for step in boundary.pending)
        means = Means(**boundary.progress.get("means", {}))
        self.session.progress = Progress(**{**boundary.progress, "means": means})
        steps, draws = self.steps, boundary.draws
        if draws is None:
            draws = boundary.epoch * steps.batches_per_epoch + boundary.update * boundary.layout[1]
        self.session.step.carry, self.session.step.draws = boundary.carry, draws

    def run(self, start_time: float, *, ignore_keys: list[str] | None = None) -> dict[str, float]:
        """Train to the end of the plan.

        Returns:
            ``{"train_loss": …}``: the mean loss of the steps of this call.

        Raises:
            TrainingError: The loss became NaN or infinite (while ``logging_nan_inf_filter`` is on).
        """
        host = self.host
        self._ignore_keys = ignore_keys
        self._start_time = start_time
        model = self.session.loaded.model
        model.train()
        with wired_memory():
            try:
                self._run_epochs()
            finally:
                model.eval()
            self._drain()
        logger.info(f"{self.session.describe_shapes()}; at most {show_bytes(mx.get_peak_memory())} were held at once")
        return {"train_loss": self._total_loss / max(host.state.global_step - self.first_step, 0.001)}

    def _run_epochs(self) -> None:
        host = self.host
        self._event("on_train_begin")
        resumed = self._resumed
        if host.args.eval_on_start and resumed is None:
            host.evaluate(ignore_keys=self._ignore_keys)
        first_epoch = 0 if resumed is None else resumed.epoch
        done = 0 if resumed is None or host.args.ignore_data_skip else resumed.update
        if resumed is not None and resumed.phase == "ended":
            first_epoch, done = self._end_epoch_again(resumed), 0
        for epoch in range(first_epoch, self.steps.epochs):
            if resumed is not None and (host.control.should_training_stop or (done == 0 and self._is_finished())):
                break
            self._event("on_epoch_begin")
            self._run_epoch(epoch, done)
            done = 0
            if host.control.should_training_stop:
                break

    def _is_stopped(self) -> bool:
        return self.host.control.should_epoch_stop or self.host.control.should_training_stop

    def _is_finished(self) -> bool:
        return self.host.state.global_step >= self.host.state.max_steps

    def _end_epoch_again(self, resumed: Boundary) -> int:
        """Do what an epoch that had ended had still to do; returns the next epoch."""
        self._epoch, self._update = resumed.epoch, resumed.update
        resumed.random.restore(self.data.rng)
        self._catch_up(resumed)
        return resumed.epoch + 1

    def _open_epoch(self, epoch: int, done: int) -> Iterator[tuple[Batch, HostInputs]]:
        """The epoch's micro-batches from update ``done`` on, with the random states of that moment."""
        rng, resumed = self.data.rng, self._resumed
        self._epoch, self._update = epoch, done
        if resumed is not None and done == 0:
            resumed.random.restore(rng)
        elif resumed is not None and resumed.epoch_order is not None:
            rng.set_state(resumed.epoch_order)
        self._epoch_order = rng.get_state()
        skip = done * self.plan.batch.gradient_accumulation_steps
        batches = self.data.train_batches(self.loader, epoch, skip)
        if resumed is not None and done > 0:
            resumed.random.restore(rng)
        return batches

    def _catch_up(self, resumed: Boundary) -> None:
        """Do what was due at the boundary, and stop where a callback had asked for it."""
        host, self._resumed = self.host, None
        if resumed.phase == "stepped":
            from transformers.trainer_callback import DefaultFlowCallback

            host.control = DefaultFlowCallback().on_step_end(host.args, host.state, host.control)
        for action in resumed.due:
            setattr(host.control, f"should_{action}", True)
        self._log_evaluate_save("ended" if resumed.phase == "ended" else "acting")
        host.control.should_epoch_stop |= resumed.epoch_stop or self._is_finished()
        if resumed.training_stop and host.args.restore_callback_states_from_checkpoint:
            host.control.should_training_stop = True

    def _mark(self, phase: str = "acting", *, saving: bool = False) -> None:
        """Remember this moment, from which the run can go on."""
        state, control, session = self.host.state, self.host.control, self.session
        due = () if saving else tuple(action for action in ACTIONS if getattr(control, f"should_{action}"))
        self.boundary = Boundary(
            epoch=self._epoch,
            update=self._update,
            phase=phase,
            due=due if phase != "stepped" else (),
            epoch_stop=control.should_epoch_stop,
            training_stop=control.should_training_stop and not self._is_finished(),
            layout=make_layout(self.steps, self.plan.batch),
            last_logged=self._last_logged,
            learning_rate=self._learning_rate,
            pending=[(m.loss, m.grad_norm, m.entropy, m.accuracy, m.micro_batches, m.aux_loss) for m in self._pending],
            progress=session.progress.to_dict(),
            seen={"num_input_tokens_seen": state.num_input_tokens_seen, "total_flos": state.total_flos},
            draws=session.step.draws,
            history=len(state.log_history),
            random=RandomStates.capture(self.data.rng),
            epoch_order=self._epoch_order,
            carry=session.step.carry,
            offset=self._offset,
        )

    def _run_epoch(self, epoch: int, done: int) -> None:
        host = self.host
        accumulation = self.plan.batch.gradient_accumulation_steps
        batches = self._open_epoch(epoch, done)
        micro = done * accumulation
        stopped = False
        if self._resumed is not None:
            self._catch_up(self._resumed)
            stopped = self._is_stopped()
        for update in range(done, self.steps.updates_per_epoch):
            # Upstream looks only after a micro-batch: a stop that was asked for before the first lets it pass.
            if stopped:
                break
            last = update == self.steps.updates_per_epoch - 1
            size = (self.steps.batches_per_epoch - 1) % accumulation + 1 if last else accumulation
            window = [(batch, laid.to_device()) for batch, laid in islice(batches, size)]
            if not window:
                break
            micro += len(window)
            self._event("on_step_begin")
            inputs = [item for _, item in window]
            trained = self._announce_substeps(window)
            ran_out = len(window) < size and micro < self.steps.batches_per_epoch
            if trained < len(window) or ran_out:
                # A callback stopped, or a stream ended, inside a window: upstream keeps the gradients for the next.
                with self._computing(inputs):
                    self.compute.accumulate(inputs, trained)
                if trained == len(window):
                    self._event("on_substep_end")
                break
            self._optimize(inputs)
            host.state.epoch = epoch + micro / self.steps.batches_per_epoch
            self._update = update + 1
            self._mark("stepped")
            self._event("on_step_end")
            self._log_evaluate_save()
            stopped = self._is_stopped()
        if micro == 0:
            warnings.warn(
                f"the dataset ran out at step {host.state.global_step} of {host.state.max_steps}; training stops here",
                stacklevel=2,
            )
            host.control.should_training_stop = True
        self._event("on_epoch_end")
        self._log_evaluate_save("ended")

    def _announce_substeps(self, window: list[tuple[Batch, Inputs]]) -> int:
        """Count the micro-batches and fire ``on_substep_end`` after all but the last.

        Returns:
            How many are to be trained: fewer than there are when a callback asked to stop between two.
        """
        for number, (batch, inputs) in enumerate(window, 1):
            self._count(batch, inputs)
            if number < len(window):
                self._event("on_substep_end")
                if self._is_stopped():
                    return number
        return len(window)

    def _count(self, batch: Batch, inputs: Inputs) -> None:
        args, state, progress = self.host.args, self.host.state, self.session.progress
        progress.mode = "train"
        progress.num_tokens += inputs.tokens
        progress.padding += inputs.padding
        progress.positions += inputs.arrays["input_ids"].size
        if args.include_num_input_tokens_seen == "all":
            state.num_input_tokens_seen += batch.input_ids.size
        elif args.include_num_input_tokens_seen == "non_padding":
            state.num_input_tokens_seen += batch.num_tokens
        state.total_flos += self.session.flops_per_token * batch.input_ids.size

    def _optimize(self, window: list[Inputs]) -> None:
        host = self.host
        made = host.state.global_step - self._offset
        self._learning_rate = self.schedule.lr(made)
        self._event("on_pre_optimizer_step")
        self.boundary = None
        with self._computing(window):
            metrics = self.compute(window, made + 1, self._learning_rate)
            metrics = settle_undefined(
                metrics, window, self.session.step, self._pending, filtered=self.plan.nan_inf_filter
            )
        self._event("on_optimizer_step")
        host.state.global_step += 1
        # One step behind, so that the device is never waited for between two steps.
        self._check(len(self._pending))
        self._pending.append(metrics)
        every = self.plan.clear_cache_steps
        if every and host.state.global_step % every == 0:
            mx.clear_cache()

    @contextmanager
    def _computing(self, window: list[Inputs]) -> Iterator[None]:
        """Where work on ``window`` fails, nothing of it stays; out of memory is said as what to write."""
        step, number, config = self.session.step, self.host.state.global_step + 1, self.host.model.config
        held = step.hold()
        try:
            with naming_shortage(lambda: describe_training(step, self.plan, config, number, window)):
                yield
        except BaseException:
            step.restore(held)
            raise

    def _check(self, stop: int) -> None:
        """Look at the losses of pending steps up to ``stop``; say at once which one is not finite."""
        for metrics in self._pending[self._checked : stop]:
            step = self._last_logged + self._checked + 1
            self._checked += 1
            loss = _read(metrics.loss)
            if math.isfinite(loss):
                continue
            if not self.plan.nan_inf_filter:
                if not self._warned:
                    self._warned = True
                    warnings.warn(
                        f"the loss is {loss} at step {step}; it is logged as it is from here on", stacklevel=2
                    )
                continue
            self._pending.clear()
            raise TrainingError(
                f"a loss of {loss} at step {step} (learning_rate={self.schedule.lr(step - 1 - self._offset):g})",
                "the loss of every step is finite; from here on every weight would be NaN",
                "lower learning_rate, set max_grad_norm=1.0, or look at the batch of that step; "
                "logging_nan_inf_filter=False goes on and logs the value as it is",
            )

    def _drain(self) -> float:
        """Sum and forget the pending losses, those of an unfinished window too; feeds the running metrics."""
        carried = self.session.step.take_carried()
        if carried is not None:
            self._pending.append(carried)
        self._check(len(self._pending))
        total = self._unfinite + sum(_read(metrics.loss) for metrics in self._pending)
        # Upstream sets its sum back by taking it from itself, so what is not finite stays in every later entry.
        self._unfinite = total - total
        means = self.session.progress.means
        for metrics in self._pending:
            means.entropy += _read(metrics.entropy)
            means.accuracy += _read(metrics.accuracy)
            means.micro_batches += int(_read(metrics.micro_batches))
            if self.session.routers is not None:
                means.aux_loss = (means.aux_loss or 0.0) + _read(metrics.aux_loss)
        self._pending.clear()
        self._checked = 0
        self._total_loss += total
        return total

    def _log_evaluate_save(self, phase: str = "acting") -> None:
        host = self.host
        self._mark(phase)
        self.interrupt.check()
        if not any(getattr(host.control, f"should_{action}") for action in ACTIONS):
            return
        if host.control.should_log and host.state.global_step > self._last_logged:
            norm, logs = self._pending[-1].grad_norm, {}
            logs["loss"] = self._drain() / (host.state.global_step - self._last_logged)
            self._last_logged = host.state.global_step
            # Upstream forgets both at an epoch's begin, and then logs the rate that the next step will use.
            if self._update and norm is not None:
                logs["grad_norm"] = norm.item()
            made = host.state.global_step - self._offset
            logs["learning_rate"] = self._learning_rate if self._update else self.schedule.lr(made)
            host.log(logs, self._start_time)
        if host.control.should_evaluate:
            self._mark(phase)
            metrics = host.evaluate(ignore_keys=self._ignore_keys)
            self._step_on_metric(metrics)
            best = update_best(host.args, host.state, metrics)
            if host.args.save_strategy == "best":
                host.control.should_save = best
        if host.control.should_save:
            self._check(len(self._pending))
            self._mark(phase, saving=True)
            host.save_checkpoint()
            self._event("on_save")
            host.adopt_additions()
        self._mark(phase)

    def _step_on_metric(self, metrics: dict[str, float]) -> None:
        if self.schedule.by_metric:
            self.schedule.step_metric(read_metric(self.host.args.metric_for_best_model, metrics))

    def _event(self, name: str) -> None:
        host = self.host
        host.control = getattr(host.callback_handler, name)(host.args, host.state, host.control)


def _read(scalar: Any) -> float:
    return float(scalar.item())


def read_metric(name: str, metrics: dict[str, float]) -> float:
    """The evaluation metric called ``name``, with or without its ``eval_`` prefix.

    Raises:
        KeyError: As upstream, with the metrics there are.
    """
    key = name if name.startswith("eval_") else f"eval_{name}"
    if key not in metrics:
        raise KeyError(
            f"received: metric_for_best_model={name!r}; required: one of the evaluation metrics {sorted(metrics)}; "
            f"remedy: return {key.removeprefix('eval_')!r} from compute_metrics or name another metric"
        )
    return metrics[key]


def update_best(args: Any, state: Any, metrics: dict[str, float]) -> bool:
    """Record a new best metric in ``state``; True when there is one (transformers ``_determine_best_metric``)."""
    if args.metric_for_best_model is None:
        return False
    value = read_metric(args.metric_for_best_model, metrics)
    better = state.best_metric is None or (
        value > state.best_metric if args.greater_is_better else value < state.best_metric
    )
    # Upstream compares with an infinite start, so a NaN is never the best.
    if not better or math.isnan(value):
        return False
    state.best_metric = value
    if args.save_strategy != "no":
        state.best_global_step = state.global_step
    return True
