"""What tells processes apart that should be alike."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np


def digest_arrays(arrays: Mapping[str, mx.array]) -> str:
    """A hash of all bits of the arrays, in the order of their names."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(np.array(array.view(mx.uint8) if array.dtype == mx.bfloat16 else array).tobytes())
    return digest.hexdigest()


def find_different(parts: Sequence[Mapping[str, Any]]) -> tuple[int, str, Any, Any] | None:
    """The first rank whose description differs from rank 0's: rank, name, its value, rank 0's; None where none does."""
    first = parts[0]
    for rank, part in enumerate(parts):
        for name in {**first, **part}:
            if part.get(name) != first.get(name):
                return rank, name, part.get(name), first.get(name)
    return None
