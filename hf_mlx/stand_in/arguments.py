"""Configuration classes take the names that older scripts write, and what only CUDA has."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

from .absent import missing_trackers
from .callers import is_library
from .homes import STAND_INS
from .imports import Imports
from .talk import Talk

_GIVEN = "_older_values"
_PRECISION = ("fp16", "bf16", "fp16_full_eval", "bf16_full_eval", "tf32")


def translate_configs(imports: Imports, talk: Talk, *, strict: bool) -> None:
    """Let every configuration class of the table take older names, which are said.

    Args:
        imports: Where to wait for their modules.
        talk: Says what is written another way today.
        strict: Leave float16 as the script asks for it, for the trainer to refuse.
    """

    def translate(name: str, module: Any) -> None:
        cls = getattr(module, name)
        cls.__init__ = _translated(cls.__init__, cls, talk)
        if name == "TrainingArguments":
            _keep_derived(cls, talk, strict=strict)
            _keep_attributes(cls, talk)

    for where in dict.fromkeys(config for row in STAND_INS for config in row.configs):
        module, _, name = where.partition(":")
        imports.after(module, functools.partial(translate, name))
    if not strict:
        imports.after("transformers.training_args", _allow_bf16)


def portable_precision(kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Keyword arguments of ``TrainingArguments`` without NVIDIA's modes.

    Returns:
        What is left, and a line for each change.
    """
    left, notes = dict(kwargs), []
    for old, new in (("fp16", "bf16"), ("fp16_full_eval", "bf16_full_eval")):
        if left.get(old) is True and not left.get(new):
            left |= {old: False, new: True}
            notes.append(f"{old}=True is done as {new}=True: the same width, without a loss scaler")
    if left.get("tf32"):
        del left["tf32"]
        notes.append("tf32=True: has no effect, it is a mode of NVIDIA's; float32 is float32 here")
    return left, notes


def keep_logging_dir(older: Mapping[str, Any]) -> None:
    """Set what took the place of ``logging_dir``, where the user has not."""
    if older.get("logging_dir"):
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(older["logging_dir"]))


def _allow_bf16(module: Any) -> None:
    # MLX computes in bfloat16 wherever it runs; torch's answer is about torch's device.
    module.is_torch_bf16_gpu_available = lambda: True


def _translated(original: Callable, owner: type, talk: Talk) -> Callable:
    positional = [
        parameter.name
        for parameter in list(inspect.signature(original).parameters.values())[1:]
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        fields = owner.__dataclass_fields__  # type: ignore[attr-defined]
        if not set(positional[: len(args)]) & kwargs.keys() and len(args) <= len(positional):
            args, kwargs = (), dict(zip(positional, args, strict=False)) | kwargs
        # A class of the script's own may have fields of these names, which mean what the script makes of them.
        older, kwargs = _older(kwargs, fields)
        kwargs, notes = _translate(older, kwargs)
        for note in notes:
            talk.once(note)
        keep_logging_dir(older)
        vars(self)[_GIVEN] = older
        original(self, *args, **kwargs)

    __init__.translates = True  # type: ignore[attr-defined]
    return __init__


def _older(kwargs: Mapping[str, Any], fields: Collection[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Older names apart from those of ``fields``."""
    from ..settings.legacy import is_older

    older = {name: value for name, value in kwargs.items() if name not in fields and is_older(name)}
    return older, {name: value for name, value in kwargs.items() if name not in older}


def _translate(older: Mapping[str, Any], current: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    from ..settings.legacy import is_older, translate_arguments

    own = {name: value for name, value in current.items() if is_older(name)}
    found, notes = translate_arguments({**older, **{name: current[name] for name in current.keys() - own.keys()}})
    return {**found, **own}, notes


def _keep_derived(cls: Any, talk: Talk, *, strict: bool) -> None:
    """Dataclasses that a script derives from ``TrainingArguments`` have a constructor of their own."""
    original: Callable = cls.__post_init__

    def __new__(cls: Any, *args: Any, **kwargs: Any) -> Any:
        own = vars(cls).get("__init__")
        if own is not None and not hasattr(own, "translates"):
            cls.__init__ = _translated(own, cls, talk)
        return object.__new__(cls)

    @functools.wraps(original)
    def __post_init__(self: Any) -> None:
        from ..settings.legacy import OLDER_FIELDS, translate_arguments

        # A field of an older name that the script declared anew, for its own default: transformers read it.
        fields = type(self).__dataclass_fields__
        declared = {
            name: getattr(self, name)
            for name in fields
            if name in OLDER_FIELDS and OLDER_FIELDS[name].left.startswith("transformers")
        }
        found, notes = translate_arguments(declared)
        for name, value in found.items():
            if name in fields and getattr(self, name) == fields[name].default:
                setattr(self, name, value)
        if not strict:
            notes += _make_portable(self)
        for note in notes:
            talk.once(note)
        original(self)

    cls.__new__ = staticmethod(__new__)
    cls.__post_init__ = __post_init__


def _make_portable(args: Any) -> list[str]:
    values = {name: getattr(args, name) for name in _PRECISION}
    left, notes = portable_precision(values)
    for name in _PRECISION:
        setattr(args, name, left.get(name))
    args.report_to, more = missing_trackers(args.report_to)
    return notes + more


def _keep_attributes(cls: Any, talk: Talk) -> None:
    """``args.max_seq_length`` in a script reads and writes today's field."""
    written: Callable = cls.__setattr__

    def __getattr__(self: Any, name: str) -> Any:
        from ..settings.legacy import is_older

        if name.startswith("_") or not is_older(name) or is_library(sys._getframe(1)):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return _read_older(self, name)

    def __setattr__(self: Any, name: str, value: Any) -> None:
        from ..settings.legacy import is_older, translate_arguments

        if not is_older(name) or name in type(self).__dataclass_fields__:
            written(self, name, value)
            return
        found, notes = translate_arguments({name: value})
        for note in notes:
            talk.once(note)
        for new, worth in found.items():
            written(self, new, worth)
        vars(self).setdefault(_GIVEN, {})[name] = value

    cls.__getattr__ = __getattr__
    cls.__setattr__ = __setattr__


def _read_older(args: Any, name: str) -> Any:
    from ..settings.legacy import OLDER_FIELDS, Gone, Renamed

    field = OLDER_FIELDS[name]
    if isinstance(field, Renamed):
        return getattr(args, field.now)
    derived: dict[str, Callable[[], Any]] = {
        "warmup_ratio": lambda: args.warmup_steps if 0 < args.warmup_steps < 1 else 0.0,
        "group_by_length": lambda: args.train_sampling_strategy == "group_by_length",
        "adafactor": lambda: args.optim == "adafactor",
        "logging_dir": lambda: os.environ.get("TENSORBOARD_LOGGING_DIR", os.path.join(args.output_dir, "runs")),
    }
    if name in derived:
        return derived[name]()
    given = vars(args).get(_GIVEN, {})
    if name in given:
        return given[name]
    return (field.harmless or (None,))[0] if isinstance(field, Gone) else None
