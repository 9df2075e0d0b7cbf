"""Flags and fields of older command lines: HfArgumentParser, TrlParser with its YAML file, ModelConfig."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from .arguments import keep_logging_dir
from .imports import Imports
from .talk import Talk

# ModelConfig's fields that have another name today.
_MODEL_FIELDS: Mapping[str, str] = {"torch_dtype": "dtype"}
# One that asked for a kernel of CUDA's.
_KERNEL = "use_flash_attention_2"


def translate_parsers(imports: Imports, talk: Talk) -> None:
    """Let parsers read older flags, and ModelConfig its older fields, once they are imported."""
    for home in ("transformers.hf_argparser", "trl.scripts._hf_argparser"):
        imports.after(home, functools.partial(_translate_flags, talk=talk))
    imports.after("trl.scripts.utils", functools.partial(_translate_file, talk=talk))
    imports.after("trl.trainer.model_config", functools.partial(_translate_model_config, talk=talk))


def translate_flags(words: Sequence[str], known: Collection[str]) -> tuple[list[str], list[str]]:
    """Rewrite older flags into today's.

    Args:
        words: The command line.
        known: Flags that the parser has, with their dashes; these stay as they are.

    Returns:
        The words of today, and one line for each flag that was rewritten.

    Raises:
        SettingError: A flag is gone and its value asked for something.
    """
    current: list[str] = []
    notes: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not word.startswith("--") or flag in known or not _is_older(name):
            current.append(word)
            continue
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "True"
        found, more = _translate({name: _read(value)})
        notes += more
        for new, given in found.items():
            current += [f"--{new}", str(given)]
    return current, notes


def _translate(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    from ..settings.legacy import translate_arguments

    found, notes = translate_arguments(values)
    if found.pop(_KERNEL, None):
        notes.append(f"{_KERNEL}=True: has no effect, MLX has its own fused attention")
    keep_logging_dir(values)
    for old, new in _MODEL_FIELDS.items():
        if old in found and new not in found:
            found[new] = found.pop(old)
            notes.append(f"{old} is now {new}")
    return found, notes


def _is_older(name: str) -> bool:
    from ..settings.legacy import is_older

    return name in _MODEL_FIELDS or name == _KERNEL or is_older(name)


def _read(value: str) -> Any:
    """A word as a Python value; a word that is none stays text."""
    import ast

    try:
        return ast.literal_eval(value.capitalize() if value.lower() in ("true", "false", "none") else value)
    except (SyntaxError, ValueError):
        return value


def _translate_flags(module: Any, talk: Talk) -> None:
    cls = module.HfArgumentParser
    original: Callable = cls.parse_args_into_dataclasses

    @functools.wraps(original)
    def parse_args_into_dataclasses(self: Any, args: Any = None, *more: Any, **kwargs: Any) -> Any:
        words = sys.argv[1:] if args is None else args
        current, notes = translate_flags(words, self._option_string_actions)
        for note in notes:
            talk.once(note)
        return original(self, current if notes else args, *more, **kwargs)

    cls.parse_args_into_dataclasses = parse_args_into_dataclasses
    read: Callable = cls.parse_dict

    @functools.wraps(read)
    def parse_dict(self: Any, args: Mapping[str, Any], *more: Any, **kwargs: Any) -> Any:
        known = {field.name for kind in self.dataclass_types for field in dataclasses.fields(kind)}
        older = {name: value for name, value in args.items() if name not in known and _is_older(name)}
        current, notes = _translate(older)
        for note in notes:
            talk.once(note)
        return read(self, {name: args[name] for name in args if name not in older} | current, *more, **kwargs)

    cls.parse_dict = parse_dict


def _translate_file(module: Any, talk: Talk) -> None:
    cls = module.TrlParser
    original: Callable = cls.set_defaults_with_config

    @functools.wraps(original)
    def set_defaults_with_config(self: Any, **kwargs: Any) -> Any:
        known = {action.dest for action in self._actions}
        older = {name: value for name, value in kwargs.items() if name not in known and _is_older(name)}
        current, notes = _translate(older)
        for note in notes:
            talk.once(note)
        return original(self, **current, **{name: value for name, value in kwargs.items() if name not in older})

    cls.set_defaults_with_config = set_defaults_with_config


def _translate_model_config(module: Any, talk: Talk) -> None:
    cls = module.ModelConfig
    original: Callable = cls.__init__

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        for old, new in _MODEL_FIELDS.items():
            if old in kwargs:
                kwargs[new] = kwargs.pop(old)
                talk.once(f"ModelConfig's {old} is now {new}")
        trusted = kwargs.pop("trust_remote_code", None)
        kwargs.pop(_KERNEL, None)
        original(self, *args, **kwargs)
        if trusted is not None:
            self.trust_remote_code = trusted

    cls.__init__ = __init__
    if not hasattr(cls, _KERNEL):
        setattr(cls, _KERNEL, False)
    if not hasattr(cls, "trust_remote_code"):
        cls.trust_remote_code = False
    for old, new in _MODEL_FIELDS.items():
        if not hasattr(cls, old):
            setattr(cls, old, _alias(new))


def _alias(name: str) -> property:
    return property(lambda self: getattr(self, name), lambda self, value: setattr(self, name, value))
