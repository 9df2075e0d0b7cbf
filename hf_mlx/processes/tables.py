"""What processes send each other outside of the step: tables of int32, each with a head that tells them apart."""

from __future__ import annotations

from collections.abc import Callable
from zlib import crc32

import numpy as np

from ..device import Coming

#: Numbers in front of each table: of what kind it is, the how many-th, a check of all of it, and its length.
HEAD = 4


class Sent:
    """A table of :meth:`~hf_mlx.processes.world.World.gather_later`, begun or not.

    Args:
        begin: Sends it.
    """

    def __init__(self, begin: Callable[[], Coming]) -> None:
        self._begin = begin
        self._coming: Coming | None = None

    def begin(self) -> None:
        """Send the table of this process, once."""
        self._coming = self._begin()

    def read(self) -> np.ndarray:
        """The tables of all processes."""
        assert self._coming is not None
        return self._coming.read()


def head_table(kind: str, number: int, table: np.ndarray, width: int) -> np.ndarray:
    """``table`` behind its head, filled with zeros.

    Args:
        kind: What it is for.
        number: The how many-th it is.
        table: int32, shape [numbers].
        width: Numbers of the result.
    """
    padded = np.zeros(width, np.int32)
    padded[: HEAD + len(table)] = [check_bytes(kind.encode()), number, 0, len(table), *table]
    padded[2] = _seal(padded)
    return padded


def is_whole(table: np.ndarray) -> bool:
    """Whether a table is as it was sent."""
    return _seal(table) == table[2]


def check_bytes(data: bytes) -> int:
    """A number of 31 bits that differs as soon as ``data`` does."""
    return crc32(data) & 0x7FFFFFFF


def _seal(table: np.ndarray) -> int:
    """The check of a table, whatever stands in the place of its own."""
    return check_bytes(table[:2].tobytes() + table[HEAD - 1 :].tobytes())
