"""The self-test's checks in order, and what they found: a table, and JSON for an issue."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import HFMLXError, MissingDependency


@dataclass(frozen=True)
class Measured:
    """What one check measured.

    Attributes:
        value: The number.
        limit: What it must not exceed; None where it is only told.
        unit: What the number is.
    """

    value: float
    limit: float | None
    unit: str


Checks = Mapping[str, Callable[[Path], Iterator[tuple[str, Measured]]]]


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        name: What was checked.
        ok: Whether the number is within its limit and nothing was raised.
        value, limit, unit: As in :class:`Measured`; None where the check ended in an error.
        error: The error, in one line.
        seconds: How long it took.
    """

    name: str
    ok: bool
    value: float | None
    limit: float | None
    unit: str
    error: str | None
    seconds: float


@dataclass(frozen=True)
class SelfTestReport:
    """What the self-test found. Prints as a table.

    Attributes:
        checks: In the order they ran.
        environment: Device, BLAS and versions, by name.
    """

    checks: tuple[Check, ...]
    environment: dict[str, str]

    @property
    def ok(self) -> bool:
        """Whether every check is."""
        return all(check.ok for check in self.checks)

    def to_json(self) -> str:
        """The report as a JSON object; it holds no model and no data of yours."""
        return json.dumps({"ok": self.ok, "environment": self.environment} | {"checks": list(map(asdict, self.checks))})

    def __str__(self) -> str:
        width = max(len(check.name) for check in self.checks)
        lines = [f"{name:<{width}}  {value}" for name, value in self.environment.items()]
        lines += [f"{check.name:<{width}}  {_line(check)}" for check in self.checks]
        wrong = [check.name for check in self.checks if not check.ok]
        lines.append(f"WRONG: {', '.join(wrong)}" if wrong else "all right: this machine trains with the right numbers")
        return "\n".join(lines)


def run_checks(checks: Checks, announce: Callable[[str], Any] = lambda name: None) -> Iterator[tuple[str, Check]]:
    """Run checks in this process, also after one that failed; each line with the name of its check.

    Args:
        checks: Name to a function of a scratch folder that yields (what, number).
        announce: Called with each check's name before it runs.
    """
    with tempfile.TemporaryDirectory() as scratch:
        for number, (name, check) in enumerate(checks.items()):
            announce(name)
            for line in _run(name, check, Path(scratch) / str(number)):
                yield name, line


def require_libraries() -> None:
    """Refuse to begin without what the runs need.

    Raises:
        MissingDependency: trl, peft or torch, whose configuration classes they use, is not installed.
    """
    absent = [name for name in ("torch", "peft", "trl") if find_spec(name) is None]
    if absent:
        raise MissingDependency(
            f"hf-mlx doctor --self-test without {', '.join(absent)}",
            "trl, peft and torch, as scripts use them",
            'pip install "hf-mlx[hf]"',
        )


def _run(name: str, check: Callable[[Path], Iterator[tuple[str, Measured]]], folder: Path) -> Iterator[Check]:
    start = time.perf_counter()
    folder.mkdir()
    try:
        for what, measured in check(folder):
            # A NaN compares as false, and so is wrong.
            ok = measured.limit is None or bool(measured.value <= measured.limit)
            seconds, start = time.perf_counter() - start, time.perf_counter()
            # JSON has no word for what is not a number.
            error = None if math.isfinite(measured.value) else f"{measured.value} {measured.unit}"
            value = None if error else measured.value
            line = (value, measured.limit, measured.unit, error, round(seconds, 2))
            yield Check(f"{name}: {what}", ok and error is None, *line)
    except Exception as error:
        # Whatever this machine raises is what the report is for.
        text = error.received if isinstance(error, HFMLXError) else " ".join(str(error).split())[:300]
        yield failed(name, f"{type(error).__name__}: {text}", time.perf_counter() - start)


def failed(name: str, error: str, seconds: float) -> Check:
    """The line of a check that gave no number."""
    return Check(name, False, None, None, "", error, round(seconds, 2))


def _line(check: Check) -> str:
    if check.error:
        return f"FAILED  {check.error}"
    if check.limit is None:
        return f"{check.value:,.0f} {check.unit}"
    verdict = "ok" if check.ok else "WRONG"
    return f"{verdict:<5}  {check.value:.1e} {check.unit}, limit {check.limit:.0e}"
