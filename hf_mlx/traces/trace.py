"""A trace file: a header line that says what the run was, then one line a step."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..intake import LARGE, Intake

VERSION = 1


@dataclass(frozen=True)
class TraceStep:
    """One optimizer step; None where the run did not log or know the value.

    Attributes:
        step: Counts from 1.
        batch: Hash of the token ids of the step's rows, in order and without padding; the same however the rows are
            padded or cut into micro-batches.
        tokens: Tokens in those rows.
        targets: Positions that the loss counts.
        loss, grad_norm, lr: As logged: the mean loss since the last log, the norm before clipping, the rate used.
    """

    step: int
    batch: str | None = None
    tokens: int | None = None
    targets: int | None = None
    loss: float | None = None
    grad_norm: float | None = None
    lr: float | None = None


@dataclass(frozen=True)
class Trace:
    """A run as traced: ``header`` holds the settings that explain differences, ``steps`` are in order."""

    header: dict[str, Any]
    steps: tuple[TraceStep, ...]


def read_trace(path: str | Path) -> Trace:
    """Read a file that :class:`~hf_mlx.traces.callback.TraceCallback` wrote.

    Raises:
        DataError: The file is missing, or is not a trace.
    """
    try:
        text = Intake(DataError, "trainer.add_callback(TraceCallback(FILE))").read_text(Path(path), 4 * LARGE)
        lines = [json.loads(line) for line in text.splitlines() if line.strip()]
        header, steps = lines[0], tuple(TraceStep(**line) for line in lines[1:])
        if header.get("trace") != VERSION:
            raise ValueError(f"its first line has no trace version {VERSION}")
    except DataError:
        raise
    except (ValueError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{path} ({error})",
            "a file of one JSON line a step, written while a run went on",
            f'trainer.add_callback(TraceCallback("{path}"))  # from hf_mlx.traces.callback',
        ) from error
    return Trace(header, steps)
