"""``mlx.launch`` as ``hf-mlx launch`` becomes it: with an exit status, and without a core of its own.

MLX's own (mlx 0.32.4) ends with 0 whatever its processes ended with, so a shell's script goes on after a failure; after
Ctrl-C it no longer shows what they say; and it never rests: it asks over and over whether it could write to them, and
whether an input that has ended (cron, nohup, CI) has more.
"""

from __future__ import annotations

import os
import runpy
import select
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from typing import Any

#: Seconds after which what is typed is handed on at the latest.
PAUSE = 0.1


def main() -> int:
    """Run ``mlx.launch`` with the arguments of this process; 1 where one of its processes failed."""
    # A copy of the module: nothing of MLX's own is changed.
    launcher: dict[str, Any] = runpy.run_module("mlx._distributed_utils.launch")
    statuses: list[int | None] = []

    class Process(launcher["RemoteProcess"]):
        @property
        def exit_status(self) -> tuple[int | None, bool]:
            found = super().exit_status
            statuses.append(found[0])
            return found

    def run(command: Any, **options: Any) -> Any:
        done = subprocess.run(command, check=options.pop("check", False), **options)
        # mpirun; what else is run is a part of ending the processes.
        if not options:
            statuses.append(done.returncode)
        return done

    launcher |= {"RemoteProcess": Process, "run": run, "select": _select}
    if not os.isatty(0):
        _keep_input_open()
    # Ctrl-C reaches the processes as well, which save and say so. A second one ends this one too.
    signal.signal(signal.SIGINT, lambda *_: signal.signal(signal.SIGINT, signal.default_int_handler))
    launcher["main"]()
    return int(any(statuses))


def _select(reading: list[int], writing: list[int], other: list[int], timeout: float) -> tuple[list[int], ...]:
    """Wait for something to read; what can be written to is always ready, and nothing to wake up for."""
    ready, _, raised = select.select(reading, [], other, min(timeout, PAUSE))
    return ready, select.select([], writing, [], 0)[1], raised


def _keep_input_open() -> None:
    """Hand on what the input has, and nothing after its end."""
    given = os.dup(0)
    reading, writing = os.pipe()
    os.dup2(reading, 0)

    def copy() -> None:
        with suppress(OSError), open(given, "rb", buffering=0) as source, open(writing, "wb", 0, closefd=False) as sink:
            shutil.copyfileobj(source, sink)

    threading.Thread(target=copy, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
