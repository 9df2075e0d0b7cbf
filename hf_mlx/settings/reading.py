"""Reads a configuration object once, into plain values, without importing what it was made with.

Only dataclass fields are read. A ``TrainingArguments`` also has properties (``device``, ``world_size``,
``train_batch_size``, …) that import torch; none of them is touched.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from ..errors import SettingError
from ..intake import Intake
from .quantization import read_quantization
from .verdicts import is_default

# Libraries whose own classes define fields with a meaning; a field of any other class is the script's.
_LIBRARIES = ("transformers", "trl", "peft", "unsloth")

# Written into a JSON file or on a command line, these may be a JSON object in a string (transformers 5.23,
# TrainingArguments._VALID_DICT_FIELDS, and trl 1.16's).
_DICTS = frozenset(
    {
        "accelerator_config",
        "fsdp_config",
        "deepspeed",
        "activation_checkpointing_kwargs",
        "gradient_checkpointing_kwargs",
        "lr_scheduler_kwargs",
        "model_init_kwargs",
        "dataset_kwargs",
    }
)


# Most values are of these, and are what they are.
_SIMPLE = frozenset({type(None), bool, int, float})

# Configuration objects that upstream itself fills in; at their defaults they ask for nothing.
_UNSET_AT_DEFAULTS = ("accelerator_config", "runtime_config")


def read_values(settings: Any) -> dict[str, Any]:
    """The fields of a dataclass instance, a namespace or a mapping, reduced to plain values.

    Enums become their values, torch dtypes their names, sets sorted lists, and a nested configuration object a dict.

    Raises:
        SettingError: ``settings`` is a class, or has no fields.
    """
    return {name: _plain(name, value) for name, value in _read_raw(settings).items()}


def read_names(settings: Any) -> set[str]:
    """The names of what :func:`read_values` reads.

    Raises:
        SettingError: As there.
    """
    return set(_read_raw(settings))


def _read_raw(settings: Any) -> dict[str, Any]:
    if isinstance(settings, Mapping):
        raw = dict(settings)
    elif dataclasses.is_dataclass(settings) and not isinstance(settings, type):
        names = [field.name for field in dataclasses.fields(settings)]
        raw = {name: getattr(settings, name) for name in names if hasattr(settings, name)}
    elif hasattr(settings, "__dict__") and not isinstance(settings, type):
        raw = vars(settings)
    else:
        raise SettingError(
            f"{settings!r}",
            "is an instance of TrainingArguments, SFTConfig or LoraConfig, or a dict of its fields",
            'SFTConfig(output_dir="out"), with the parentheses',
        )
    return {name: value for name, value in raw.items() if not name.startswith("_")}


def read_defaults(settings: Any) -> dict[str, Any]:
    """The defaults that the object's own class declares; empty for a mapping or a namespace."""
    if not dataclasses.is_dataclass(settings):
        return {}
    found: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        if field.default is not dataclasses.MISSING:
            found[field.name] = _plain(field.name, field.default)
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = _plain(field.name, field.default_factory())
    return found


def owner(settings: Any, field: str) -> str | None:
    """The name of the script's own class that declares ``field``; None when a library declares it."""
    for cls in type(settings).__mro__:
        if field in inspect.get_annotations(cls):
            return None if cls.__module__.partition(".")[0] in _LIBRARIES else cls.__qualname__
    return None


def _plain(name: str, value: Any) -> Any:
    if name == "quantization_config" and value is not None:
        return read_quantization(value)
    if type(value) in _SIMPLE:
        return value
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, str):
        return _from_json(name, value) if name in _DICTS else value
    if isinstance(value, Mapping):
        return {key: _plain(str(key), item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(name, item) for item in value), key=str)
    if isinstance(value, (list, tuple)):
        return [_plain(name, item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # Of most configuration objects the mere presence turns something on, at its defaults too.
        return _changed(value) if name in _UNSET_AT_DEFAULTS else read_values(value) or repr(value)
    if type(value).__module__ == "torch" and type(value).__name__ == "dtype":
        return str(value).removeprefix("torch.")
    return value


def _changed(settings: Any) -> dict[str, Any]:
    values, defaults = read_values(settings), read_defaults(settings)
    return {name: value for name, value in values.items() if not is_default(value, defaults.get(name))}


def _from_json(name: str, text: str) -> Any:
    # A path is what AcceleratorConfig and deepspeed take, an object in braces what a command line holds.
    try:
        if text.lstrip().startswith("{"):
            return json.loads(text)
        if name == "accelerator_config":
            return Intake(SettingError, f"{name}=None").read_json(Path(text))
    except SettingError:
        raise
    except (ValueError, RecursionError) as error:
        raise SettingError(f"{name}={text!r}", f"is a dict or readable JSON ({error})", f"{name}=None") from error
    return text
