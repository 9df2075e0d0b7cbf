"""Ctrl-C at a moment of our choosing: the step under way ends first, so that a whole state can be saved."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Interrupt:
    """Remembers a Ctrl-C until :meth:`check` is called; the second one is not held back.

    Args:
        is_shared: Other processes have to stop at the same step, so :meth:`check` leaves it to what asks all of them.
    """

    def __init__(self, *, is_shared: bool = False) -> None:
        self._requested = False
        self._is_shared = is_shared

    @property
    def is_requested(self) -> bool:
        """Whether Ctrl-C was pressed."""
        return self._requested

    def check(self) -> None:
        """Raise KeyboardInterrupt if Ctrl-C was pressed since the last call."""
        if self._requested and not self._is_shared:
            self._requested = False
            raise KeyboardInterrupt

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """Hold Ctrl-C back in this block; without effect outside the main thread or under a handler of the user's."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.getsignal(signal.SIGINT)
        if before is not signal.default_int_handler:
            yield
            return
        signal.signal(signal.SIGINT, self._remember)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _remember(self, number: int, frame: Any) -> None:
        if self._requested:
            raise KeyboardInterrupt
        self._requested = True
        print("\nCtrl-C: stopping after this step (again: at once, without a checkpoint).", file=sys.stderr, flush=True)
