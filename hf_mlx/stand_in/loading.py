"""``from_pretrained`` takes what only CUDA has: quantised weights, device maps, CUDA's attention kernels."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ..models.bridge import REQUESTED_BITS
from ..settings.quantization import read_bits
from .trainers import say

# Attention kernels that exist on CUDA only; transformers' own default takes their place.
_PORTABLE_ATTENTION = ("eager", "sdpa", "flex_attention", None)


def portable_kwargs(kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], int | None, list[str]]:
    """Keyword arguments of ``from_pretrained`` without what only CUDA has.

    Returns:
        What is left, the bits that were asked for (None for none), and a line for each change.
    """
    left, notes = dict(kwargs), []
    bits = read_bits(left.get("quantization_config") or {}) or read_bits(left)
    if bits is not None:
        for name in ("quantization_config", "load_in_4bit", "load_in_8bit"):
            left.pop(name, None)
        notes.append(
            f"{bits}-bit loading: bitsandbytes needs CUDA. The torch object is loaded in floating point, and the copy "
            f"that trains is quantised to {bits} bits by MLX (another codebook, so the curve differs a little)"
        )
    device_map = left.pop("device_map", None)
    if device_map is not None:
        notes.append(f"device_map={device_map!r}: has no effect, memory is unified")
    attention = left.get("attn_implementation")
    if attention not in _PORTABLE_ATTENTION:
        left.pop("attn_implementation")
        notes.append(f"attn_implementation={attention!r}: has no effect, MLX has its own fused attention")
    return left, bits, notes


def translate_loading() -> None:
    """Let ``from_pretrained`` take what only CUDA has."""
    from transformers import AutoModelForCausalLM, PreTrainedModel

    for cls in (AutoModelForCausalLM, PreTrainedModel):
        original: Callable = inspect.getattr_static(cls, "from_pretrained").__func__
        setattr(cls, "from_pretrained", classmethod(_portable(original)))  # noqa: B010


def _portable(original: Callable) -> Callable:
    @functools.wraps(original)
    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        kwargs, bits, notes = portable_kwargs(kwargs)
        for note in notes:
            say(f"hf-mlx run: {note}")
        model = original(cls, *args, **kwargs)
        if bits is not None:
            setattr(model, REQUESTED_BITS, bits)
        return model

    return from_pretrained
