"""Where mlx-lm computes something else than transformers: subclasses, and changes on the loaded instance.

:func:`model_classes` gives the classes to build (for what changes parameters), :func:`adapt` changes a
loaded instance (for what changes only the computation). No mlx-lm class is ever modified.
"""

from __future__ import annotations

from .registry import adapt, model_classes

__all__ = ["adapt", "model_classes"]
