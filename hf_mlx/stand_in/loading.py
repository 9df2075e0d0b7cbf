"""``from_pretrained`` takes what only CUDA has: quantised weights, device maps, CUDA's attention kernels."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

from .callers import is_library
from .imports import Imports
from .talk import Talk

_BITS = ("quantization_config", "load_in_4bit", "load_in_8bit", "bnb_4bit_", "llm_int8_")
_OFFLOADING = ("max_memory", "offload_folder", "offload_state_dict", "offload_buffers", "low_cpu_mem_usage")
# Attention kernels that exist on CUDA only; transformers' own default takes their place.
_PORTABLE_ATTENTION = ("eager", "sdpa", "flex_attention", None)


def portable_kwargs(kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], int | None, list[str]]:
    """Keyword arguments of ``from_pretrained`` without what only CUDA has.

    Returns:
        What is left, the bits that were asked for (None for none), and a line for each change.
    """
    from ..settings.quantization import read_bits

    left, notes = dict(kwargs), []
    bits = read_bits(left.get("quantization_config") or {}) or read_bits(left)
    if bits is not None:
        for name in [name for name in left if name.startswith(_BITS)]:
            left.pop(name)
        notes.append(
            f"{bits}-bit loading: bitsandbytes needs CUDA. The torch object is loaded in floating point, and the copy "
            f"that trains is quantised to {bits} bits by MLX (another codebook, so the curve differs a little)"
        )
    for name in ("load_in_4bit", "load_in_8bit"):
        left.pop(name, None)
    device_map = left.pop("device_map", None)
    for name in _OFFLOADING:
        left.pop(name, None)
    if device_map is not None:
        notes.append(f"device_map={device_map!r}: has no effect, memory is unified")
    attention = left.get("attn_implementation")
    if not _is_portable(attention):
        left.pop("attn_implementation")
        notes.append(_no_effect(attention))
    if left.pop("use_flash_attention_2", None):
        notes.append("use_flash_attention_2=True: has no effect, MLX has its own fused attention")
    token = left.pop("use_auth_token", None)
    if token is not None:
        left.setdefault("token", token)
        notes.append("use_auth_token is now token")
    return left, bits, notes


def _is_portable(attention: Any) -> bool:
    return isinstance(attention, Mapping) or attention in _PORTABLE_ATTENTION


def _no_effect(attention: Any) -> str:
    return f"attn_implementation={attention!r}: has no effect, MLX has its own fused attention"


def translate_loading(imports: Imports, talk: Talk) -> None:
    """Let ``from_pretrained`` take what only CUDA has, once transformers is imported."""

    def translate(name: str, module: Any) -> None:
        cls = getattr(module, name)
        original: Callable = vars(cls)["from_pretrained"].__func__
        cls.from_pretrained = classmethod(_portable(original, talk))

    imports.after("transformers.models.auto.auto_factory", functools.partial(translate, "_BaseAutoModelClass"))
    imports.after("transformers.modeling_utils", functools.partial(translate, "PreTrainedModel"))
    imports.after("transformers.modeling_utils", _map_devices)
    imports.after("transformers.configuration_utils", _save_floats)
    imports.after("transformers.configuration_utils", functools.partial(_set_attention, talk=talk))


def _portable(original: Callable, talk: Talk) -> Callable:
    @functools.wraps(original)
    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        asked = kwargs
        config = kwargs.get("config")
        if config is not None and _is_marked(config):
            kwargs["config"] = config = copy.copy(config)
            del config.quantization_config
        kwargs, bits, notes = portable_kwargs(kwargs)
        for note in notes:
            talk.once(note)
        model = original(cls, *args, **kwargs)
        if bits is not None:
            _mark(model[0] if isinstance(model, tuple) else model, bits, asked)
        return _place(model) if asked.get("device_map") is not None else model

    return from_pretrained


def _mark(model: Any, bits: int, asked: Mapping[str, Any]) -> None:
    """What a script reads from a model that bitsandbytes quantised."""
    from transformers import BitsAndBytesConfig

    from ..settings.quantization import REQUESTED_BITS

    setattr(model, REQUESTED_BITS, bits)
    config = asked.get("quantization_config")
    if config is None:
        config = {name: value for name, value in asked.items() if name.startswith(_BITS)}
    # A copy: the script may load with its own once more.
    config = BitsAndBytesConfig(**config) if isinstance(config, Mapping) else copy.copy(config)
    model.config.quantization_config = config
    setattr(model.config.quantization_config, REQUESTED_BITS, bits)
    setattr(model, f"is_loaded_in_{bits}bit", True)


def _is_marked(config: Any) -> bool:
    from ..settings.quantization import REQUESTED_BITS

    return hasattr(getattr(config, "quantization_config", None), REQUESTED_BITS)


def _place(model: Any) -> Any:
    """Where ``device_map`` puts a model on this machine: a Mac's "mps"."""
    import torch

    return model.to("mps") if torch.backends.mps.is_available() and hasattr(model, "to") else model


def _map_devices(module: Any) -> None:
    """``model.hf_device_map`` for a script; libraries move models that have one."""

    def read(self: Any) -> dict[str, Any]:
        kept = vars(self).get("_hf_device_map")
        if kept is None and is_library(sys._getframe(1)):
            raise AttributeError("hf_device_map")
        return {"": self.device} if kept is None else kept

    def write(self: Any, value: Any) -> None:
        vars(self)["_hf_device_map"] = value

    module.PreTrainedModel.hf_device_map = property(read, write)


def _save_floats(module: Any) -> None:
    """A config file says nothing of a quantisation that the weights beside it do not have."""
    cls = getattr(module, "PreTrainedConfig", None) or module.PretrainedConfig
    for name in ("to_dict", "to_diff_dict"):
        setattr(cls, name, _without_quantization(getattr(cls, name)))


def _set_attention(module: Any, talk: Talk) -> None:
    """``config._attn_implementation = "flash_attention_2"`` keeps the attention that is here."""
    cls = getattr(module, "PreTrainedConfig", None) or module.PretrainedConfig
    found = cls._attn_implementation

    def write(self: Any, value: Any) -> None:
        if _is_portable(value):
            found.fset(self, value)
            return
        talk.once(_no_effect(value))
        if not hasattr(self, "_attn_implementation_internal"):
            found.fset(self, None)

    cls._attn_implementation = property(found.fget, write)


def _without_quantization(original: Callable) -> Callable:
    @functools.wraps(original)
    def write(self: Any) -> dict[str, Any]:
        found = original(self)
        if _is_marked(self):
            found.pop("quantization_config", None)
        return found

    return write
