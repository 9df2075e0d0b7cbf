"""How gradients are clipped, decided once from two numbers."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Literal, SupportsFloat

from ..errors import SettingError

# The elementwise threshold an MLX-native caller gets when neither setting asks for anything.
DEFAULT_VALUE_CLIP = 1.0


@dataclass(frozen=True)
class GradClip:
    """The clip that is in force.

    Attributes:
        mode: ``"norm"`` scales all gradients by ``min(1, threshold / (norm + 1e-6))`` with the global L2 norm
            (torch 2.13, ``torch.nn.utils.clip_grad_norm_``); ``"value"`` limits each element to
            ``[-threshold, threshold]``; ``"none"`` leaves gradients as they are.
        threshold: In the gradient's own units; 0.0 for ``"none"``.
    """

    mode: Literal["norm", "value", "none"]
    threshold: float

    def describe(self) -> str:
        """One line for the log."""
        if self.mode == "norm":
            return f"gradient clipping: global norm {self.threshold:g}"
        if self.mode == "value":
            return f"gradient clipping: elementwise {self.threshold:g}"
        return "gradient clipping: off"


def resolve_grad_clip(max_grad_norm: float | None, max_grad_value: float | None) -> GradClip:
    """Decide the effective clip.

    ==================  ==============  ================================================
    max_grad_value      max_grad_norm   effective
    ==================  ==============  ================================================
    None                0 or None       elementwise 1.0 (the cheap default)
    None                > 0             global norm, as HF and TRL do
    0                   0 or None       no clipping
    0                   > 0             global norm
    > 0                 0 or None       elementwise
    > 0                 > 0             elementwise; a warning says the norm is dropped
    ==================  ==============  ================================================

    :class:`~hf_mlx.MLXSFTTrainer` passes ``max_grad_value=0`` unless its caller set one, because
    ``TrainingArguments(max_grad_norm=0)`` means *off*: an HF script never gets a clip it did not ask for.

    Args:
        max_grad_norm: Largest global L2 norm; 0 or None means no norm clip.
        max_grad_value: Largest absolute element; 0 means no elementwise clip, None means not set.

    Raises:
        SettingError: A value is negative, NaN, infinite, a bool, or not a number.
    """
    norm = 0.0 if max_grad_norm is None else _checked("max_grad_norm", max_grad_norm)
    value = None if max_grad_value is None else _checked("max_grad_value", max_grad_value)
    if value is None:
        return GradClip("norm", norm) if norm else GradClip("value", DEFAULT_VALUE_CLIP)
    if value:
        if norm:
            warnings.warn(
                f"max_grad_value={value:g} clips elementwise, so max_grad_norm={norm:g} is dropped; "
                "set max_grad_norm=0 to silence this, or max_grad_value=0 to clip by norm.",
                stacklevel=2,
            )
        return GradClip("value", value)
    return GradClip("norm", norm) if norm else GradClip("none", 0.0)


def _checked(name: str, value: object) -> float:
    # bool is an int in Python; True as a threshold is always a mistake.
    if not isinstance(value, (bool, str, bytes)) and isinstance(value, SupportsFloat):
        try:
            number = float(value)
        except (OverflowError, ValueError, TypeError):
            number = math.nan
        if math.isfinite(number) and number >= 0:
            return number
    raise SettingError(
        f"{name}={value!r}"[:200],
        f"{name} is a finite number >= 0, or None",
        f"write {name}=1.0 to clip, or {name}=0 to leave gradients alone",
    )
