"""Configuration classes take the names that older scripts write, and what only CUDA has."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from .homes import STAND_INS
from .imports import Imports
from .talk import Talk


def translate_configs(imports: Imports, talk: Talk, *, strict: bool) -> None:
    """Let every configuration class of the table take older names, which are said.

    Args:
        imports: Where to wait for their modules.
        talk: Says what is written another way today.
        strict: Leave float16 as the script asks for it, for the trainer to refuse.
    """

    def translate(name: str, module: Any) -> None:
        cls = getattr(module, name)
        cls.__init__ = _translated(cls.__init__, talk, strict=strict)

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


def _allow_bf16(module: Any) -> None:
    # MLX computes in bfloat16 wherever it runs; torch's answer is about torch's device.
    module.is_torch_bf16_gpu_available = lambda: True


def _translated(original: Callable, talk: Talk, *, strict: bool) -> Callable:
    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        from ..settings.legacy import translate_arguments

        kwargs, notes = translate_arguments(kwargs)
        if not strict:
            kwargs, more = portable_precision(kwargs)
            notes += more
        for note in notes:
            talk.once(note)
        original(self, *args, **kwargs)

    return __init__
