"""The version of this library, as installed, and what it was tested with."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version

logger = logging.getLogger(__name__)

#: Lowest and highest version of what this release was tested with, and a set between (``make compat``).
TESTED: Mapping[str, tuple[str, str]] = {
    "transformers": ("5.17.0", "5.24.0"),
    "trl": ("1.16.0", "1.16.0"),
    "peft": ("0.21.0", "0.21.2"),
    "mlx": ("0.32.0", "0.32.4"),
    "mlx-lm": ("0.32.0", "0.32.2"),
}


class _Once:
    """Whether this process was told about versions."""

    said = False


def installed_version() -> str:
    """The distribution's version; ``0+source`` in a source tree that was never installed."""
    return _version("hf-mlx") or "0+source"


@cache
def find_version(name: str) -> str | None:
    """The version of an installed package, whose metadata are parsed once; None where it is not installed."""
    return _version(name)


def describe_tested() -> str:
    """What this release was tested with, in a line."""
    return "tested with " + ", ".join(
        f"{name} {low}" if low == high else f"{name} {low} to {high}" for name, (low, high) in TESTED.items()
    )


def find_untested() -> list[str]:
    """What is installed and outside of that: below the lowest, or of a later minor version than the highest.

    A later patch release is taken for the version that it repairs.
    """
    found = []
    for name, (low, high) in TESTED.items():
        here = _version(name)
        if here is None:
            continue
        if _numbers(here) < _numbers(low) or _numbers(here)[:2] > _numbers(high)[:2]:
            found.append(f"{name} {here} (tested: {low} to {high})")
    return found


def warn_untested() -> None:
    """Say once a process which installed versions this release was not tested with."""
    if _Once.said:
        return
    _Once.said = True
    untested = find_untested()
    if untested:
        highest = " ".join(f'"{name}<={high}"' for name, (_, high) in TESTED.items())
        logger.warning(
            f"hf-mlx {installed_version()} was not tested with {', '.join(untested)}: numbers may differ from "
            f"upstream's. hf-mlx doctor --self-test compares them; pip install {highest} goes back"
        )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.split("+")[0])[:3])
