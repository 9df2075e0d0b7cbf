"""Where the time between launch and the first step went."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import mlx.core as mx

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StartUp:
    """Seconds of wall time that the start of a run took, stage by stage; what the script does between is left out.

    Attributes:
        script: From the launch of the process to the trainer's constructor: the interpreter, imports and what else the
            script did. None where psutil is not installed.
        settings: Reading the arguments into a plan.
        files: Finding the model's folder; for a hub id the hub's answer and the download.
        tokenizer: Loading the tokenizer.
        data: Checking the model and preparing the datasets.
        model: Reading the weights, placing the adapter, setting up the optimizer; on the Linux CPU, the first time on a
            machine, also the end of compiling what MLX's kernels include.
        callbacks: Callbacks, trackers and, with ``push_to_hub``, the repository.
        opening: From ``train()`` to its first step: the checkpoint it resumes from, the first batch, the callbacks'
            ``on_train_begin`` and ``eval_on_start``.
        first_step: Tracing, compiling and running the first step. None until it is done.
    """

    script: float | None
    settings: float = 0.0
    files: float = 0.0
    tokenizer: float = 0.0
    data: float = 0.0
    model: float = 0.0
    callbacks: float = 0.0
    opening: float = 0.0
    first_step: float | None = None

    @property
    def total(self) -> float:
        """All stages but ``script``."""
        return sum(self._stages().values())

    def describe(self) -> str:
        """One line for the log."""
        stages = ", ".join(f"{name.replace('_', ' ')} {seconds:.1f} s" for name, seconds in self._stages().items())
        before = "" if self.script is None else f", after {self.script:.1f} s of imports and script"
        return f"Started in {self.total:.1f} s{before}: {stages}"

    def _stages(self) -> dict[str, float]:
        stages = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "script"}
        return {name: seconds for name, seconds in stages.items() if seconds is not None}


class StartClock:
    """Measures the stages of a :class:`StartUp`, one after the other.

    Attributes:
        finished: Whether the first step was measured.
    """

    def __init__(self) -> None:
        self.finished = False
        self._script = _seconds_since_launch()
        self._stages: dict[str, float] = {}
        self.resume()

    def resume(self) -> None:
        """Leave out the time since the last stage."""
        self._since = time.perf_counter()

    def end(self, stage: str) -> None:
        """Say that what ran since the last stage was ``stage``."""
        now = time.perf_counter()
        self._stages[stage] = self._stages.get(stage, 0.0) + now - self._since
        self._since = now

    def read(self) -> StartUp:
        """What was measured so far."""
        return StartUp(self._script, **self._stages)

    @contextmanager
    def first_step(self, handler: Any) -> Iterator[None]:
        """End the stages ``opening`` and ``first_step`` when this block's first step begins and is done; says so once.

        Args:
            handler: ``transformers.CallbackHandler``. Its events are followed on this instance until then: no callback
                of ours stands in the user's list.
        """
        if self.finished:
            yield
            return
        self.resume()
        replaced, fire = vars(handler).get("call_event"), handler.call_event
        began = False

        def restore() -> None:
            vars(handler).pop("call_event", None)
            if replaced is not None:
                handler.call_event = replaced

        def call_event(event: str, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            nonlocal began
            if event == "on_step_begin" and not began:
                began = True
                self.end("opening")
            elif event == "on_optimizer_step":
                restore()
                self._finish()
            return fire(event, args, state, control, **kwargs)

        handler.call_event = call_event
        try:
            yield
        finally:
            if not self.finished:
                restore()

    def _finish(self) -> None:
        # The device works behind the host; here, once in a run, it is waited for.
        mx.synchronize()
        self.end("first_step")
        self.finished = True
        logger.info(self.read().describe())


def _seconds_since_launch() -> float | None:
    try:
        import psutil
    except ImportError:
        return None
    return max(0.0, time.time() - psutil.Process().create_time())
