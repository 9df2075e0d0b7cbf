"""The self-test from outside: each check has its time, and a process that ends or hangs takes one check with it.

MLX ends a process for some of what a GPU's driver reports (mlx issue 3267), and waits for a kernel that never ends. The
checks run in a child for that; where one is lost, another child goes on with the next.
"""

from __future__ import annotations

import json
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import IO, Any

from .report import Check, Checks, SelfTestReport, failed, require_libraries, run_checks
from .worker import ASK, MARK

#: Seconds that one check may take; half a minute is what all of them take on two cores.
LIMIT = 180.0
# And until the first check: torch, transformers and trl are imported.
_START = 300.0
_WORKER = (sys.executable, "-m", "hf_mlx.self_test.worker")


def run_self_test(
    checks: Checks | None = None,
    announce: Callable[[str], Any] = lambda name: None,
    *,
    limit: float = LIMIT,
    worker: Sequence[str] = _WORKER,
) -> SelfTestReport:
    """Run every check, also after one that failed.

    Args:
        checks: Name to a function of a scratch folder that yields (what, number), run in this process and without a
            limit; None runs all in a process of their own.
        announce: Called with each check's name before it runs.
        limit: Seconds that a check may take; one that takes longer has failed.
        worker: The command that is given the checks' names.

    Raises:
        MissingDependency: trl, peft or torch, whose configuration classes the runs use, is not installed.
    """
    require_libraries()
    if checks is not None:
        from ..models.doctor import environment

        found = [check for _, check in run_checks(checks, announce)]
        return SelfTestReport(tuple(found), environment())
    from .checks import CHECKS

    found, left, told = [], list(CHECKS), {}
    while left:
        run = _Child([*worker, *left], left, announce, limit)
        found += run.found
        told = told or run.environment
        left = run.left
    return SelfTestReport(tuple(found), told)


class _Child:
    """One process, until it is done or has lost a check.

    Attributes:
        found: Lines of the report, the lost check's among them.
        left: Checks after the lost one.
        environment: What it says it runs on; empty where it did not come to that.
    """

    def __init__(
        self, command: Sequence[str], names: Sequence[str], announce: Callable[[str], Any], limit: float
    ) -> None:
        self.found: list[Check] = []
        self.left: list[str] = []
        self.environment: dict[str, str] = {}
        self._names, self._announce, self._limit = list(names), announce, limit
        self._current, self._begun, self._allowed = names[0], time.monotonic(), _START
        self._before, ended = 0.0, _cpu_seconds()
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace")
            try:
                lost = self._follow(process)
                if lost:
                    process.send_signal(ASK)
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(timeout=1)
            finally:
                process.kill()
                # A process that waits in a driver dies when that lets it.
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=10)
            if lost is not None:
                errors.seek(0)
                said = errors.read()
                if lost:
                    lost += _whereabouts(
                        said, None if process.returncode is None else _cpu_seconds() - ended - self._before
                    )
                self._lose(lost or _reason(process.returncode, said))

    def _follow(self, process: subprocess.Popen[str]) -> str | None:
        """Read what it says; None once it is done, else why its check is lost (empty where the process ended)."""
        messages: Queue[dict[str, Any] | None] = Queue()
        Thread(target=_read, args=(process.stdout, messages), daemon=True).start()
        while True:
            try:
                message = messages.get(timeout=max(self._begun + self._allowed - time.monotonic(), 0))
            except Empty:
                return f"did not end within {self._allowed:g} s, and was stopped"
            if message is None:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=10)
                return ""
            if message.get("done"):
                return None
            self._take(message)

    def _take(self, message: dict[str, Any]) -> None:
        if "environment" in message:
            self.environment = message["environment"]
        elif "begins" in message:
            self._current, self._begun, self._allowed = message["begins"], time.monotonic(), self._limit
            # The process is not among the children that have ended: what it had used joins their time at its end.
            self._before = message["cpu"]
            self._announce(self._current)
        else:
            self.found.append(Check(**message["check"]))

    def _lose(self, error: str) -> None:
        self.found.append(failed(self._current, error, time.monotonic() - self._begun))
        self.left = self._names[self._names.index(self._current) + 1 :]


def _read(stream: IO[str] | None, messages: Queue[dict[str, Any] | None]) -> None:
    assert stream is not None
    for line in stream:
        # A library's own line may stand before ours without an end.
        if MARK in line:
            with suppress(ValueError):
                messages.put(json.loads(line.partition(MARK)[2]))
    messages.put(None)


def _cpu_seconds() -> float:
    """CPU time of this process's children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _whereabouts(said: str, seconds: float | None) -> str:
    """The line that a stopped process was at, and what it did: a kernel that compiles keeps a core busy."""
    # Its threads follow each other, the first one last and each with its innermost frame first.
    frames = re.findall(r'\(most recent call first\):\n  File "([^"]*)", line (\d+) in (\S+)', said)
    parts = [f" at {Path(file).name}:{line} in {name}" for file, line, name in frames[-1:]]
    if seconds is not None:
        parts.append(f" after {seconds:.0f} s of CPU time")
    return "".join(parts)


def _reason(status: int | None, errors: str) -> str:
    if status is not None and status < 0:
        how = f"the process was ended by {signal.Signals(-status).name}"
    else:
        how = f"the process ended with status {status}"
    said = [line for line in errors.splitlines() if line.strip()]
    return f"{how}: {' '.join(said[-1].split())[:300]}" if said else how
