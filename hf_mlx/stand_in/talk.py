"""What the user is told: each change as it is made, each of CUDA's answers in one line at the end."""

from __future__ import annotations

import sys

from ..processes.launcher import read_launcher


def say(line: str) -> None:
    """Print to standard error, on the first of several processes: the script's own output stays as it is."""
    launched = read_launcher()
    if launched is None or launched.rank == 0:
        print(line, file=sys.stderr, flush=True)


class Talk:
    """Says each line once; keeps answers for one line at the end."""

    def __init__(self) -> None:
        self._said: set[str] = set()
        self._answers: dict[str, str] = {}

    def once(self, note: str) -> None:
        """Say that something is done another way."""
        if note not in self._said:
            self._said.add(note)
            say(f"hf-mlx run: {note}")

    def answered(self, question: str, answer: object) -> None:
        """Keep what the script was told about CUDA, the first time it asks."""
        self._answers.setdefault(question, str(answer).partition("\n")[0])

    def summary(self) -> None:
        """Say all answers in one line."""
        if self._answers:
            shown = ", ".join(f"{question} {answer}" for question, answer in self._answers.items())
            say(f"hf-mlx run: CUDA as the script found it: {shown}")
