"""``torch.cuda`` as a script written for CUDA expects it: one capable device, whose memory is MLX's.

Only the script is told so. torch, transformers, accelerate, peft and trl ask the same functions where to put their
tensors, so whoever is installed in ``site-packages`` gets torch's own answer.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from .callers import is_library
from .cuda_objects import offer_objects
from .talk import Talk

# The generation whose checks scripts write: bfloat16, flash attention and tf32 begin at 8.0.
_CAPABILITY = (8, 0)
# A release that everything written for this generation takes.
_RELEASE = "12.4"


def answer_cuda(torch: Any, talk: Talk) -> None:
    """Let ``torch.cuda`` answer a script; what it answers to libraries stays."""
    for name, answer in _ANSWERS.items():
        original = getattr(torch.cuda, name, None)
        setattr(torch.cuda, name, _answering(name, answer, original, talk))
    torch.cuda.Event = _Event
    _answer_version(torch.version, talk)
    offer_objects(torch)
    # Used by transformers' pipelines around a device that a script named, so not only by scripts.
    torch.cuda.device.__enter__ = lambda self: None
    torch.cuda.device.__exit__ = lambda self, *error: False


def _answering(name: str, answer: Callable, original: Callable | None, talk: Talk) -> Callable:
    def ask(*args: Any, **kwargs: Any) -> Any:
        if original is not None and is_library(sys._getframe(1)):
            return original(*args, **kwargs)
        value = answer(*args, **kwargs)
        if value is not None:
            talk.answered(f"{name}()", _shown(value))
        return value

    return ask if original is None else functools.wraps(original)(ask)


def _answer_version(version: Any, talk: Talk) -> None:
    def cuda(module: Any) -> str | None:
        if is_library(sys._getframe(1)):
            return vars(module).get("cuda")
        talk.answered("version", _RELEASE)
        return _RELEASE

    version.__class__ = type("Version", (type(version),), {"cuda": property(cuda)})


def _shown(value: Any) -> str:
    return value.name if isinstance(value, SimpleNamespace) else str(value)


def device_name(device: Any = None) -> str:
    """What MLX computes on."""
    import mlx.core as mx

    return str(mx.device_info().get("device_name", "MLX"))


def total_memory() -> int:
    """Bytes that MLX's device has."""
    import mlx.core as mx

    # The CPU backend says nothing about memory.
    return int(mx.device_info().get("memory_size") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _properties(device: Any = None) -> SimpleNamespace:
    major, minor = _CAPABILITY
    return SimpleNamespace(
        name=device_name(), total_memory=total_memory(), major=major, minor=minor, multi_processor_count=1
    )


def _allocated(device: Any = None) -> int:
    import mlx.core as mx

    return mx.get_active_memory()


def reserved(device: Any = None) -> int:
    """Bytes that MLX holds."""
    import mlx.core as mx

    return mx.get_active_memory() + mx.get_cache_memory()


def _peak(device: Any = None) -> int:
    import mlx.core as mx

    return mx.get_peak_memory()


def _reset_peak(device: Any = None) -> None:
    import mlx.core as mx

    mx.reset_peak_memory()


def _memory_stats(device: Any = None) -> dict[str, int]:
    return {
        "allocated_bytes.all.current": _allocated(), "allocated_bytes.all.peak": _peak(),
        "reserved_bytes.all.current": reserved(), "reserved_bytes.all.peak": _peak(),
    }  # fmt: skip


def _nothing(*args: Any, **kwargs: Any) -> None:
    """MLX needs none of it."""


_ANSWERS: Mapping[str, Callable[..., Any]] = {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "is_bf16_supported": lambda *args, **kwargs: True,
    "is_tf32_supported": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "get_device_name": device_name,
    "get_device_capability": lambda device=None: _CAPABILITY,
    "get_device_properties": _properties,
    "get_arch_list": lambda: [f"sm_{_CAPABILITY[0]}{_CAPABILITY[1]}"],
    "mem_get_info": lambda device=None: (total_memory() - reserved(), total_memory()),
    "memory_allocated": _allocated,
    "max_memory_allocated": _peak,
    "memory_reserved": reserved,
    "max_memory_reserved": _peak,
    "memory_cached": reserved,
    "max_memory_cached": _peak,
    "memory_stats": _memory_stats,
    "memory_summary": lambda *args, **kwargs: "\n".join(f"{key}: {value}" for key, value in _memory_stats().items()),
    "reset_peak_memory_stats": _reset_peak,
    "reset_max_memory_allocated": _reset_peak,
    "reset_max_memory_cached": _reset_peak,
    "reset_accumulated_memory_stats": _nothing,
    "empty_cache": _nothing,
    "synchronize": _nothing,
    "ipc_collect": _nothing,
    "init": _nothing,
    "set_device": _nothing,
    "set_per_process_memory_fraction": _nothing,
    "can_device_access_peer": lambda *args: False,
    "is_current_stream_capturing": lambda: False,
    "get_sync_debug_mode": lambda: 0,
    "set_sync_debug_mode": _nothing,
}


class _Event:
    """``torch.cuda.Event`` by the host's clock: torch's work here is done when its call returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._time = 0.0

    def record(self, stream: Any = None) -> None:
        self._time = time.perf_counter()

    def synchronize(self) -> None:
        """Nothing is under way."""

    def wait(self, stream: Any = None) -> None:
        """Nothing is under way."""

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: _Event) -> float:
        """Milliseconds between the two."""
        return (end._time - self._time) * 1000
