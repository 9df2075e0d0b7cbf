"""What ``torch.cuda`` has besides answers: streams, random states, profilers' marks."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any

from .callers import is_library


class Stream:
    """torch's work here is done when its call returns, so that every stream is idle."""

    device_index = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Any device, any priority."""

    def synchronize(self) -> None:
        """Nothing is under way."""

    wait_stream = wait_event = record_event = lambda self, *args: None

    def query(self) -> bool:
        """Whether everything is done."""
        return True

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: Any) -> bool:
        return False


def offer_objects(torch: Any) -> None:
    """Let a script use them; libraries keep torch's own functions."""
    torch.cuda.Stream = Stream
    _for_scripts(
        torch.cuda,
        current_stream=lambda *args: Stream(),
        default_stream=lambda *args: Stream(),
        stream=lambda stream=None: contextlib.nullcontext(),
        get_rng_state=lambda *args: torch.get_rng_state(),
        get_rng_state_all=lambda: [torch.get_rng_state()],
        set_rng_state=lambda state, *args: torch.set_rng_state(state),
        set_rng_state_all=lambda states: torch.set_rng_state(states[0]),
        initial_seed=torch.initial_seed,
    )
    _for_scripts(torch.cuda.memory, _record_memory_history=_nothing, _dump_snapshot=_nothing)
    _for_scripts(torch.cuda.nvtx, range_push=_nothing, range_pop=_nothing, mark=_nothing)
    torch.cuda.nvtx.range = lambda *args, **kwargs: contextlib.nullcontext()


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Nothing is measured."""


def _for_scripts(module: Any, **answers: Callable) -> None:
    for name, answer in answers.items():
        setattr(module, name, _choosing(getattr(module, name, answer), answer))


def _choosing(original: Callable, answer: Callable) -> Callable:
    def ask(*args: Any, **kwargs: Any) -> Any:
        return (original if is_library(sys._getframe(1)) else answer)(*args, **kwargs)

    return ask
