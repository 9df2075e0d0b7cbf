"""What is due between two steps: log, evaluate, save."""

from __future__ import annotations

from ..checkpoints.boundary import ACTIONS, Boundary
from ..checkpoints.interrupt import Interrupt
from ..training.schedules.contract import Schedule
from .best import read_metric, update_best
from .host import Host, fire
from .pending import Pending
from .place import Place


class Actions:
    """Does what the control asks for, in transformers' order (``_maybe_log_save_evaluate``).

    Args:
        host: The trainer.
        place: Marked before and after each action.
        pending: Read for a log entry.
        schedule: Learning rate by step; may go by an evaluation's metric.
        interrupt: Looked at first.
    """

    def __init__(self, host: Host, place: Place, pending: Pending, schedule: Schedule, interrupt: Interrupt) -> None:
        self._host = host
        self._place = place
        self._pending = pending
        self._schedule = schedule
        self._interrupt = interrupt
        self.start_time = 0.0
        self.ignore_keys: list[str] | None = None

    def __call__(self, phase: str = "acting") -> None:
        """Log, evaluate and save as far as the control asks for it.

        Args:
            phase: See :class:`~hf_mlx.checkpoints.boundary.Boundary`.
        """
        host, place, pending = self._host, self._place, self._pending
        place.mark(pending, phase)
        self._interrupt.check()
        if not any(getattr(host.control, f"should_{action}") for action in ACTIONS):
            return
        if host.control.should_log and host.state.global_step > pending.last_logged:
            self._log()
        if host.control.should_evaluate:
            place.mark(pending, phase)
            self._evaluate()
        if host.control.should_save:
            pending.check()
            place.mark(pending, phase, saving=True)
            host.save_checkpoint()
            fire(host, "on_save")
            host.adopt_additions()
        place.mark(pending, phase)

    def catch_up(self, resumed: Boundary) -> None:
        """Do what was due at the boundary, and stop where a callback had asked for it."""
        host, self._place.resumed = self._host, None
        if resumed.phase == "stepped":
            from transformers.trainer_callback import DefaultFlowCallback

            host.control = DefaultFlowCallback().on_step_end(host.args, host.state, host.control)
        for action in resumed.due:
            setattr(host.control, f"should_{action}", True)
        self("ended" if resumed.phase == "ended" else "acting")
        host.control.should_epoch_stop |= resumed.epoch_stop or host.state.global_step >= host.state.max_steps
        if resumed.training_stop and host.args.restore_callback_states_from_checkpoint:
            host.control.should_training_stop = True

    def _log(self) -> None:
        host, place, pending = self._host, self._place, self._pending
        norm, logs = pending.grad_norm, {}
        logs["loss"] = pending.drain() / (host.state.global_step - pending.last_logged)
        pending.last_logged = host.state.global_step
        # Upstream forgets both at an epoch's begin, and then logs the rate that the next step will use.
        if place.update and norm is not None:
            logs["grad_norm"] = norm.item()
        made = host.state.global_step - place.offset
        logs["learning_rate"] = place.learning_rate if place.update else self._schedule.lr(made)
        host.log(logs, self.start_time)

    def _evaluate(self) -> None:
        host = self._host
        metrics = host.evaluate(ignore_keys=self.ignore_keys)
        if self._schedule.by_metric:
            self._schedule.step_metric(read_metric(host.args.metric_for_best_model, metrics))
        best = update_best(host.args, host.state, metrics)
        if host.args.save_strategy == "best":
            host.control.should_save = best
