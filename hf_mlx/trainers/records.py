"""What a trainer logs, prints and writes about its run, and its callbacks."""

from __future__ import annotations

from typing import Any

from ..checkpoints.files import check_output_dir, disk_errors
from ..checkpoints.inspection import STATE
from ..checkpoints.trainer_state import write_trainer_state
from ..surface import reporting
from ..surface.trackers import prepare_trackers
from .names import Names


class Records(Names):
    """Logs, metrics and states; callbacks."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add TRL's metrics to ``logs``, append the entry to ``state.log_history`` and tell the callbacks."""
        from transformers.trainer_utils import speed_metrics

        logs.update(self._evaluate_loader.running_metrics())
        logs.update(self._take_own_metrics())
        if self.state.epoch is not None:
            logs["epoch"] = self.state.epoch
        if self.args.include_num_input_tokens_seen != "no":
            logs["num_input_tokens_seen"] = self.state.num_input_tokens_seen
            if start_time is not None:
                tokens = self.state.num_input_tokens_seen - self._tokens_before
                logs.update(speed_metrics("train", start_time, num_tokens=tokens))
        self._recorder.note(len(self.state.log_history), self.session.progress.num_tokens)
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    def save_state(self) -> None:
        """Write ``trainer_state.json`` into ``output_dir``, on the first process."""
        if not self.world.is_main:
            return
        folder = check_output_dir(self.args.output_dir)
        with disk_errors(folder):
            write_trainer_state(self.state, folder / STATE)

    def log_metrics(self, split: str, metrics: dict[str, Any]) -> None:
        """Print ``metrics`` as a table, on the first process."""
        if self.world.is_main:
            reporting.print_metrics(split, metrics)

    def save_metrics(self, split: str, metrics: dict[str, Any], combined: bool = True) -> None:
        """Write ``{split}_results.json`` and, when ``combined``, ``all_results.json``, on the first process."""
        if self.world.is_main:
            reporting.write_metrics(self.args.output_dir, split, metrics, combined=combined)

    def num_examples(self, dataloader: Any) -> int:
        """Rows behind a loader or in a dataset; estimated from its batches where a loader does not say."""
        try:
            return len(dataloader.dataset)
        except (AttributeError, TypeError):
            return len(dataloader) * self.args.per_device_train_batch_size

    def add_callback(self, callback: Any) -> None:
        """Add a callback class or instance."""
        self.callback_handler.add_callback(callback)
        prepare_trackers(self.callback_handler)

    def pop_callback(self, callback: Any) -> Any:
        """Remove a callback and return it."""
        return self.callback_handler.pop_callback(callback)

    def remove_callback(self, callback: Any) -> None:
        """Remove a callback."""
        self.callback_handler.remove_callback(callback)

    def is_world_process_zero(self) -> bool:
        """Whether this is the first of all processes."""
        return self.world.is_main

    def is_local_process_zero(self) -> bool:
        """Whether this is the first process of its machine."""
        return self.world.is_local_main
