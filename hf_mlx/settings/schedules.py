"""The learning-rate schedules of ``transformers.SchedulerType`` (5.23) and the options each one reads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

from ..errors import SettingError
from .verdicts import Case, Ruling, Values, adapted, given, honoured, one_of, otherwise, refused

_PLATEAU = ("mode", "factor", "patience", "threshold", "threshold_mode", "cooldown", "min_lr", "eps")

# name -> the keys of lr_scheduler_kwargs that its function takes (transformers 5.23, optimization.py).
OPTIONS: Mapping[str, tuple[str, ...]] = {
    "linear": (),
    "cosine": ("num_cycles",),
    "cosine_with_restarts": ("num_cycles",),
    "polynomial": ("lr_end", "power"),
    "constant": (),
    "constant_with_warmup": (),
    "inverse_sqrt": ("timescale",),
    "reduce_lr_on_plateau": _PLATEAU,
    "cosine_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate", "warmup_lr_rate"),
    "warmup_stable_decay": (
        "num_decay_steps",
        "num_stable_steps",
        "warmup_type",
        "decay_type",
        "min_lr_ratio",
        "num_cycles",
    ),
    "greedy": (*_PLATEAU, "warmup", "max_lr", "verbose", "smooth", "window_size", "reset_start"),
}

# Options that are words, and the words they may be.
_WORDS: Mapping[str, tuple[Any, ...]] = {
    "warmup_type": ("linear", "cosine", "1-sqrt"),
    "decay_type": ("linear", "cosine", "1-sqrt"),
    "mode": ("min", "max"),
    "threshold_mode": ("rel", "abs"),
    "verbose": (True, False),
    "smooth": (True, False),
}

STEPPED_BY_METRIC = ("reduce_lr_on_plateau", "greedy")
WITHOUT_WARMUP = ("constant", *STEPPED_BY_METRIC)


def _ignores_warmup(value: Any, values: Values) -> bool:
    warmup = values.get("warmup_steps")
    return value in WITHOUT_WARMUP and isinstance(warmup, (int, float)) and warmup > 0


SCHEDULE_CASES: tuple[Case, ...] = (
    given(
        '"constant" with warmup_steps > 0',
        lambda value, values: value == "constant" and _ignores_warmup(value, values),
        adapted("has no warmup, here as in transformers, so warmup_steps does nothing; constant_with_warmup has one"),
    ),
    given(
        '"reduce_lr_on_plateau" or "greedy" with warmup_steps > 0',
        _ignores_warmup,
        adapted("has no warmup, here as in transformers, so warmup_steps does nothing"),
    ),
    one_of(*OPTIONS, ruling=honoured("transformers' formula, in double precision")),
    otherwise(refused(f"is not a schedule of transformers: {', '.join(OPTIONS)}", write='lr_scheduler_type="linear"')),
)


OPTIONS_CASES: tuple[Case, ...] = (
    given(
        "a key that the schedule does not read",
        lambda value, values: judge_options(value, values).verdict == "REFUSE",
        refused("would have no effect, or upstream raises a TypeError", write="lr_scheduler_kwargs=None"),
    ),
    otherwise(honoured("options of the schedule")),
)


def judge_options(value: Any, values: Values) -> Ruling:
    """Rule on ``lr_scheduler_kwargs``: every key must be read by the schedule that was chosen."""
    try:
        check_options(str(values.get("lr_scheduler_type", "linear")), value)
    except SettingError as error:
        return refused(error.required, write=error.remedy)
    return honoured("options of the schedule")


def check_options(name: str, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Check ``lr_scheduler_kwargs`` against the schedule that reads them, and return them as a dict.

    Raises:
        SettingError: Not a dict, a key that the schedule does not read, a value out of range, or a required key
            that is missing.
    """
    options = {} if options is None else options
    known = OPTIONS.get(name, ())
    if not isinstance(options, Mapping):
        raise SettingError(f"lr_scheduler_kwargs={options!r}", "takes a dict", "lr_scheduler_kwargs=None")
    unknown = [key for key in options if key not in known]
    if unknown:
        raise SettingError(
            f"lr_scheduler_kwargs={dict(options)!r}",
            f"has {', '.join(map(repr, unknown))}, which {name} does not read ({', '.join(known) or 'it reads none'})",
            f"lr_scheduler_kwargs={ {key: value for key, value in options.items() if key in known} or None!r}",
        )
    for key, value in options.items():
        _check_option(key, value)
    _check_required(name, options)
    return dict(options)


def _check_option(key: str, value: Any) -> None:
    words = _WORDS.get(key)
    if words is not None:
        valid, required = value in words, "one of " + ", ".join(map(repr, words))
    else:
        number = isinstance(value, Real) and not isinstance(value, bool)
        valid, required = value is None or (number and math.isfinite(value)), "a finite number"
    if not valid:
        example = repr(words[0]) if words else "0.5"
        raise SettingError(
            f"lr_scheduler_kwargs={{{key!r}: {value!r}}}",
            f"has {key}={value!r}, which must be {required}",
            f"lr_scheduler_kwargs={{{key!r}: {example}}}",
        )


def _check_required(name: str, options: Mapping[str, Any]) -> None:
    if name == "warmup_stable_decay" and options.get("num_decay_steps") is None:
        raise SettingError(
            f"lr_scheduler_kwargs={dict(options)!r}",
            "must hold num_decay_steps for warmup_stable_decay",
            'lr_scheduler_kwargs={"num_decay_steps": 100}',
        )
    floors = [key for key in ("min_lr", "min_lr_rate") if options.get(key) is not None]
    if name in ("cosine_with_min_lr", "cosine_warmup_with_min_lr") and len(floors) != 1:
        raise SettingError(
            f"lr_scheduler_kwargs={dict(options)!r}",
            f"must hold exactly one of min_lr and min_lr_rate for {name}",
            'lr_scheduler_kwargs={"min_lr_rate": 0.1}',
        )
