"""What only the moment of a log entry knows: its time, tokens and memory. Host counters: no device is waited for."""

from __future__ import annotations

import time

import mlx.core as mx

from .run import Mark


class Recorder:
    """Marks of one call of ``train()``.

    Attributes:
        marks: By an entry's place in ``log_history``; at -1 the beginning.
    """

    def __init__(self) -> None:
        self.marks: dict[int, Mark] = {}
        self._start: float | None = None

    def start(self, tokens: float) -> None:
        """Begin, with so many tokens trained on before."""
        self._start = time.perf_counter()
        self.marks = {-1: Mark(0.0, tokens, 0)}

    def note(self, place: int, tokens: float) -> None:
        """Take the counters for the entry at ``place``; without a run under way, nothing."""
        if self._start is not None:
            self.marks[place] = Mark(time.perf_counter() - self._start, tokens, mx.get_peak_memory())

    def stop(self) -> None:
        """Entries from here on belong to no run."""
        self._start = None
