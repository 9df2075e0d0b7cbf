"""Types that are Llamas by another name, and what others built on mlx-lm's Llama share."""

from __future__ import annotations

from typing import Any

import mlx.nn as nn
from mlx_lm.models import llama


def classes() -> tuple[type[Any], type]:
    """What builds a type whose parameters and computation are a Llama's."""
    return llama.Model, llama.ModelArgs


def blocks_of(model: nn.Module) -> list[Any]:
    """The blocks of a Llama that is being built, to be given other parts."""
    inner: Any = model["model"]
    return inner.layers
