"""A user's torch model beside MLX: its tensors under checkpoint and PEFT names, over one at a time and back.

torch is imported by the functions that need it, so a model named by a string never brings it in. Tensors that
torch hands out here share memory with the model, so writing into them writes into the user's object.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..errors import MissingDependency, ModelError, SettingError
from ..settings.plan import ModelPlan
from ..settings.quantization import REQUESTED_BITS
from .load import LoadedModel, assemble
from .torch_arrays import to_mlx, to_torch
from .vocabulary import recorded_rows
from .weights import Checkpoint, Tensor

_DTYPES = {
    "torch.float32": "F32", "torch.bfloat16": "BF16", "torch.float16": "F16", "torch.float64": "F64",
    "torch.int64": "I64", "torch.int32": "I32", "torch.uint8": "U8", "torch.int8": "I8", "torch.bool": "BOOL",
}  # fmt: skip
_FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def is_torch_model(model: Any) -> bool:
    """Whether ``model`` is a torch module; torch is not imported to find out."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(model, torch.nn.Module)


class TorchModel:
    """A transformers model object, or a PeftModel around one.

    Args:
        model: What the user handed over; it stays theirs and is only ever written to by :meth:`write`.

    Attributes:
        model: The same object.
        base: The transformers model inside.
        adapter: Name of the active adapter, or None for a plain model.

    Raises:
        SettingError: Not a transformers model, quantised by bitsandbytes, partly on disk, or with several adapters.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.adapter = _active_adapter(model)
        self.base = model.get_base_model() if self.adapter is not None else model
        _check_model(self.base)

    @property
    def name(self) -> str:
        """What the model was loaded from: a hub id, a folder or, made from a config, its class."""
        return getattr(self.base.config, "_name_or_path", "") or type(self.base).__name__

    @property
    def peft_config(self) -> Any:
        """The active adapter's LoraConfig; None for a plain model."""
        return None if self.adapter is None else self.model.peft_config[self.adapter]

    @cached_property
    def config(self) -> dict[str, Any]:
        """``config.json`` as it would be saved now."""
        config = self.base.config.to_dict()
        config.pop("quantization_config", None)
        # A model made from a config object names no class until it is saved.
        return config | {"architectures": config.get("architectures") or [type(self.base).__name__]}

    @property
    def quantization(self) -> dict[str, bool] | None:
        """The quantisation that was asked for on loading, as a config; None for none."""
        bits = getattr(self.base, REQUESTED_BITS, None)
        return None if bits is None else {f"load_in_{bits}bit": True}

    def attach(self, peft_config: Any, seed: int) -> None:
        """Wrap the model as ``trl.SFTTrainer`` does: PEFT's own init after ``set_seed(seed)``.

        Raises:
            MissingDependency: peft is not installed.
        """
        try:
            from peft import get_peft_model
        except ImportError as error:
            raise MissingDependency(
                "peft_config= without peft installed", "peft, whose LoRA layers go into your model", "pip install peft"
            ) from error
        from transformers import set_seed

        set_seed(seed)
        self.model = get_peft_model(self.model, peft_config)
        self.adapter = "default"

    def tensors(self, *, tied: bool = False) -> dict[str, Any]:
        """The base's tensors under the names and layouts of its checkpoint files; ``tied`` copies too, or without."""
        from transformers.core_model_loading import revert_weight_conversion

        held = {plain: value for name, value in self.base.state_dict().items() if (plain := _base_name(name))}
        if not tied and self.base.config.get_text_config().tie_word_embeddings:
            held = _drop_tied(held)
        return revert_weight_conversion(self.base, held)

    def adapter_tensors(self) -> dict[str, Any]:
        """The active adapter's tensors under PEFT's keys."""
        from peft import get_peft_model_state_dict

        name = self.adapter or "default"
        return get_peft_model_state_dict(self.model, adapter_name=name, save_embedding_layers=False)

    def frozen(self) -> set[str]:
        """Checkpoint names of base parameters with ``requires_grad=False``."""
        shared = {value.data_ptr() for value in self.base.parameters() if not value.requires_grad}
        return {name for name, value in self.tensors().items() if value.data_ptr() in shared}

    def trained(self) -> set[str]:
        """Names of what ``requires_grad``, the adapter's own name left out, as PEFT's keys are."""
        names = (name for name, value in self.model.named_parameters() if value.requires_grad)
        return {without_adapter(name, self.adapter) if self.adapter else name for name in names}

    def place(self, device: Any) -> None:
        """Move the model to where upstream's trainer would have put it, so that ``inputs.to(device)`` still fits."""
        if len({value.device for value in self.model.parameters()} - {device}) > 0:
            self.model.to(device)

    def write(self, arrays: Mapping[str, mx.array], held: Mapping[str, Any]) -> None:
        """Copy arrays into the model, one tensor at a time.

        Args:
            arrays: By the names of :meth:`tensors` or :meth:`adapter_tensors`.
            held: Those tensors.
        """
        import torch

        live = {value.untyped_storage().data_ptr() for value in self.model.parameters()}
        detached = [name for name in arrays if held[name].untyped_storage().data_ptr() not in live]
        with torch.no_grad():
            for name, value in arrays.items():
                held[name].copy_(to_torch(value))
            if detached:
                self._reload(held)

    def _reload(self, held: Mapping[str, Any]) -> None:
        # transformers 5 fuses some experts on loading, so those tensors are copies: let it fuse them again.
        fresh = type(self.base).from_pretrained(None, config=self.base.config, state_dict=dict(held))
        for (name, mine), (_, theirs) in zip(self.base.named_parameters(), fresh.named_parameters(), strict=True):
            if mine.shape != theirs.shape:
                raise ModelError(
                    f"{name} of shape {tuple(theirs.shape)} on the way back into the model",
                    f"shape {tuple(mine.shape)}",
                    "trainer.save_model(dir), then AutoModelForCausalLM.from_pretrained(dir)",
                )
            mine.copy_(theirs)


def load_torch_model(source: TorchModel, plan: ModelPlan) -> LoadedModel:
    """Build the MLX model of a torch object: its config, its weights, its dtypes.

    Args:
        source: The object. Its tensors are copied one at a time; no file is written.
        plan: Read for quantisation only; the dtype is the object's own, as in TRL.

    Raises:
        ModelError: As :func:`~hf_mlx.models.load.load_model` for the same model in a folder.
    """

    def read() -> tuple[Checkpoint, dict[str, mx.array]]:
        held = source.tensors()
        return _describe(held), dict(_cross(held))

    own = replace(plan, precision=replace(plan.precision, dtype="auto"))
    loaded = assemble(Path(source.name), source.config, read, own)
    recorded, rows = recorded_rows(source.name), source.base.config.get_text_config().vocab_size
    loaded.resized = recorded not in (None, rows)
    if source.adapter is None:
        loaded.buffers += _frozen_parameters(loaded, source.frozen())
        loaded.freeze_buffers()
    return loaded


def model_dtype(source: TorchModel) -> str:
    """The one floating dtype of the object's base, or ``"auto"`` where it has several."""
    found = {_DTYPES.get(str(value.dtype), "") for value in source.base.parameters() if value.is_floating_point()}
    return _FLOATS.get(next(iter(found)), "auto") if len(found) == 1 else "auto"


def _cross(held: Mapping[str, Any]) -> Iterator[tuple[str, mx.array]]:
    for name, tensor in held.items():
        array = to_mlx(tensor)
        # The copy is made before the next tensor is touched.
        mx.eval(array)
        yield name, array


def _describe(held: Mapping[str, Any]) -> Checkpoint:
    tensors = {name: Tensor(_DTYPES[str(value.dtype)], tuple(value.shape), "") for name, value in held.items()}
    return Checkpoint((), tensors, "hf")


def _frozen_parameters(loaded: LoadedModel, frozen: set[str]) -> tuple[str, ...]:
    paths = []
    for path, _ in tree_flatten(loaded.model.parameters()):
        names = loaded.names.to_hf_names(path)
        still = [name in frozen for name in names]
        if any(still) and not all(still):
            raise SettingError(
                f"{names[still.index(True)]} frozen and {names[still.index(False)]} not",
                "requires_grad alike on tensors that are one array on MLX",
                f"set requires_grad alike on all of {', '.join(names[:4])}",
            )
        if any(still):
            paths.append(path)
    return tuple(paths)


def _active_adapter(model: Any) -> str | None:
    if not hasattr(model, "peft_config") or not hasattr(model, "get_base_model"):
        return None
    active = model.active_adapters if isinstance(model.active_adapters, list) else [model.active_adapter]
    if len(active) != 1:
        raise SettingError(
            f"a PeftModel with the active adapters {active!r}", "one active adapter", 'model.set_adapter("default")'
        )
    return active[0]


def _check_model(base: Any) -> None:
    quantised = getattr(base, "is_loaded_in_4bit", False) or getattr(base, "is_loaded_in_8bit", False)
    if quantised and not hasattr(base, REQUESTED_BITS):
        bits = 4 if getattr(base, "is_loaded_in_4bit", False) else 8
        raise SettingError(
            f"a {type(base).__name__} that bitsandbytes quantised to {bits} bits",
            "weights in floating point; MLX quantises them itself",
            f'MLXSFTTrainer(model="{getattr(base.config, "_name_or_path", "")}", '
            f"quantization_config=BitsAndBytesConfig(load_in_{bits}bit=True), ...), or load the object without "
            "quantization_config and pass that to the trainer",
        )
    if not hasattr(base, "config") or not hasattr(base.config, "get_text_config"):
        raise SettingError(
            f"model of type {type(base).__name__}",
            "a hub id, the path of a model folder, a transformers model or a PeftModel around one",
            'MLXSFTTrainer(model=AutoModelForCausalLM.from_pretrained("owner/name"), ...)',
        )
    away = next((name for name, value in base.named_parameters() if value.device.type == "meta"), None)
    if away is not None:
        raise SettingError(
            f"a model whose {away} is not in memory (device meta, offloaded by device_map)",
            "all weights in memory",
            'AutoModelForCausalLM.from_pretrained("owner/name"), without device_map',
        )


def _base_name(name: str) -> str | None:
    """The name a state-dict key has without PEFT's layers around it; None for an adapter's own tensor."""
    parts = name.split(".")
    if any(part.startswith(("lora_", "trainable_tokens_")) for part in parts) or "modules_to_save" in parts:
        return None
    return ".".join(part for part in parts if part not in ("base_layer", "original_module", "token_adapter"))


def without_adapter(name: str, adapter: str) -> str:
    """The name without the adapter's: a layer may be called the same, so only below PEFT's own containers."""
    parts = name.split(".")
    below = (i for i, part in enumerate(parts) if part == adapter and i and _holds_adapters(parts[i - 1]))
    place = next(below, None)
    return name if place is None else ".".join(parts[:place] + parts[place + 1 :])


def _holds_adapters(part: str) -> bool:
    return part.startswith(("lora_", "trainable_tokens_")) or part == "modules_to_save"


def _drop_tied(held: Mapping[str, Any]) -> dict[str, Any]:
    seen: set[tuple] = set()
    kept = {}
    for name, value in held.items():
        place = (value.data_ptr(), tuple(value.shape))
        if place not in seen:
            kept[name] = value
        seen.add(place)
    return kept
