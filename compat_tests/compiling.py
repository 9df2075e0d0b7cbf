"""Functions without mx.compile: on the Linux CPU g++ takes longer to build their kernels than tests to compare."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pytest

_NAMES = "UNCOMPILED"


def compiles_all(config: pytest.Config) -> bool:
    """Whether the wide comparisons run, which compile everything."""
    return "not wide" not in config.option.markexpr


@contextmanager
def uncompiled_if(condition: bool) -> Iterator[None]:
    """A block without mx.compile where ``condition`` is true."""
    if not condition:
        yield
        return
    import mlx.core as mx  # not before the BLAS is loaded

    mx.disable_compile()
    try:
        yield
    finally:
        mx.enable_compile()


def tell_uncompiled(names: Iterable[str]) -> dict[str, str]:
    """The variable by which a process is told what :func:`is_uncompiled` there."""
    return {_NAMES: " ".join(names)}


def is_uncompiled(name: str) -> bool:
    """Whether this process is to play ``name`` without mx.compile."""
    return name in os.environ.get(_NAMES, "").split()
