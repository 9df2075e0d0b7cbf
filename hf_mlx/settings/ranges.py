"""Checks that a number lies where the formula that uses it is defined."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from ..errors import SettingError


def check_number(
    name: str,
    value: Any,
    remedy: str,
    *,
    low: float = 0.0,
    above: float | None = None,
    below: float | None = None,
) -> float:
    """A finite number, ``>= low`` (or ``> above``) and ``< below``.

    Raises:
        SettingError: A string, a bool, NaN, infinite or out of range.
    """
    bounds = f"> {above:g}" if above is not None else f">= {low:g}"
    required = f"{name} is a finite number {bounds}" + (f" and < {below:g}" if below is not None else "")
    number = _read_number(value)
    if number is not None:
        inside = number > above if above is not None else number >= low
        if inside and (below is None or number < below):
            return number
    raise SettingError(f"{name}={_show(value)}", required, f"write {remedy}")


def _show(value: Any) -> str:
    # Python refuses to write out an int of more than 4300 digits.
    if isinstance(value, Integral) and abs(int(value)) >= 10**4000:
        return f"a number of {int(math.log10(abs(int(value)))) + 1} digits"
    return repr(value)


def _read_number(value: Any) -> float | None:
    if not isinstance(value, Real) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def check_count(name: str, value: Any, remedy: str, *, low: int = 1, below: int = 2**63) -> int:
    """A whole number ``>= low`` and ``< below``; 8.0 counts as 8.

    Raises:
        SettingError: A string, a bool, a fraction, or out of range.
    """
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    too_large = value == math.inf
    if whole or (isinstance(value, float) and value.is_integer()):
        count = int(value)
        if low <= count < below:
            return count
        too_large = count >= below
    upper = f" and < {below}" if below < 2**63 or too_large else ""
    raise SettingError(f"{name}={_show(value)}", f"{name} is a whole number >= {low}{upper}", f"write {remedy}")


def check_optional_count(name: str, value: Any, remedy: str, *, low: int = 1) -> int | None:
    """None, or a whole number ``>= low``."""
    return None if value is None else check_count(name, value, remedy, low=low)


def check_flag(name: str, value: Any) -> bool:
    """True or False, and nothing that merely looks like it: the string "False" is true in Python.

    None is False, as it is upstream for a switch that has no third meaning.

    Raises:
        SettingError: Anything else.
    """
    if value is None or isinstance(value, bool) or (isinstance(value, Integral) and value in (0, 1)):
        return bool(value)
    raise SettingError(f"{name}={value!r}", f"{name} is True or False", f"write {name}={str(value).lower() == 'true'}")


def check_text(name: str, value: Any, remedy: str) -> str:
    """A string that is not empty.

    Raises:
        SettingError: Anything else.
    """
    if isinstance(value, str) and value:
        return value
    raise SettingError(f"{name}={value!r}", f"{name} is a string that is not empty", f"write {remedy}")


def check_strings(name: str, value: Any) -> tuple[str, ...] | str | None:
    """None, one string, or several.

    Raises:
        SettingError: Anything else.
    """
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise SettingError(f"{name}={value!r}", f"{name} is a string or a list of strings", f'write {name}=["q_proj"]')


def check_pattern(name: str, value: str, form: str = "{}") -> str:
    """A string that is a regular expression where PEFT puts it into ``form``.

    Raises:
        SettingError: It does not compile.
    """
    try:
        re.compile(form.format(value))
    except (re.error, OverflowError, RecursionError) as error:
        raise SettingError(
            f"{name}={value!r}"[:200],
            f"{name} is a regular expression that compiles ({error or type(error).__name__})",
            f"write {name} with re.escape(...) around what is meant literally, or a list of module names",
        ) from error
    return value


def check_interval(values: Mapping[str, Any], event: str) -> None:
    """``<event>_steps`` is positive when ``<event>_strategy`` is ``"steps"``; above 1 it is whole.

    ``save_steps`` may also be 0 or less, which is never.

    Raises:
        SettingError: It is not.
    """
    if values[f"{event}_strategy"] != "steps":
        return
    name = f"{event}_steps"
    number = _read_number(values[name])
    if event == "save" and number is not None and number <= 0:
        return  # never by count, as transformers' DefaultFlowCallback has it
    steps = check_number(name, values[name], f"{name}=10", above=0.0)
    if steps > 1:
        check_count(name, steps, f"{name}={math.ceil(steps)}, or a share of the run below 1")
