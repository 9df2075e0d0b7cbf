"""transformers' own trainer, whatever stands in its place."""

from __future__ import annotations

from typing import Any


def upstream_trainer() -> Any:
    """``transformers.Trainer``; under ``hf-mlx run`` the class that its stand-in replaced.

    Raises:
        ImportError: torch is not installed.
    """
    import torch  # noqa: F401
    from transformers import Trainer

    return getattr(Trainer, "upstream", Trainer)
