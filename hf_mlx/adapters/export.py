"""Adapters out: a folder that ``PeftModel.from_pretrained`` loads."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..errors import AdapterError
from .adapter import Adapter
from .config import FORMAT, config_to_json
from .files import write_files, write_text
from .origin import resolve_origin
from .slots import Slot, slots_of
from .source import CONFIG, WEIGHTS
from .vocabulary import carried_slots

if TYPE_CHECKING:
    from ..models.load import LoadedModel


def export_adapter(
    trainer_or_model: Any, folder: str | Path, *, base: str | None = None, revision: str | None = None
) -> Path:
    """Write a trained adapter as PEFT would.

    Args:
        trainer_or_model: An :class:`MLXSFTTrainer`, an :class:`Adapter`, or anything with an ``adapter``.
        folder: Where to write.
        base: ``base_model_name_or_path`` to record; found out where not given.
        revision: The base's revision to record.

    Returns:
        The folder.

    Raises:
        AdapterError: There is no adapter, its tensors are not what PEFT expects, a value is not finite, or the
            folder holds a whole model.
    """
    adapter = trainer_or_model if isinstance(trainer_or_model, Adapter) else getattr(trainer_or_model, "adapter", None)
    if not isinstance(adapter, Adapter):
        raise AdapterError(
            f"{type(trainer_or_model).__name__} without an adapter",
            "a trainer made with peft_config, or an adapter",
            "MLXSFTTrainer(..., peft_config=LoraConfig(...)); a full fine-tune: trainer.save_model(dir)",
        )
    _check_no_model(Path(folder).expanduser())
    return write_adapter(adapter, adapter.loaded, folder, base=base, revision=revision)


def _check_no_model(folder: Path) -> None:
    # transformers takes a folder with adapter_config.json for an adapter, whatever model lies beside it.
    if any(folder.glob("model*.safetensors")) or any(folder.glob("pytorch_model*.bin")):
        raise AdapterError(
            f"folder {folder}, which holds a whole model",
            "a folder for the adapter alone: with both in one, transformers would load the model as an adapter's base",
            f'another place: export_adapter(trainer, "{folder.resolve()}-adapter")',
        )


def write_adapter(
    adapter: Adapter,
    loaded: LoadedModel,
    folder: str | Path,
    *,
    base: str | None = None,
    revision: str | None = None,
) -> Path:
    """Write adapter_model.safetensors, adapter_config.json and, where there is none, README.md.

    ``PeftModel.from_pretrained`` only warns about missing keys and is silent about unexpected ones, so the
    tensors are first proven against the set that the config and the model call for.

    Args:
        adapter: What to write.
        loaded: The model it is attached to.
        folder: Where to write; files of other names in it are left alone.
        base: ``base_model_name_or_path`` to record; found out where not given.
        revision: The base's revision to record.

    Returns:
        The folder.

    Raises:
        AdapterError: As for :func:`export_adapter`.
    """
    folder = Path(folder)
    name, revision = resolve_origin(loaded, base, revision)
    tensors = peft_tensors(adapter)
    if adapter.split is not None and not adapter.split.world.is_main:
        return folder
    config = config_to_json(adapter, name, revision)
    writers: dict[str, Callable[[Path], None]] = {
        WEIGHTS: lambda path: mx.save_safetensors(str(path), tensors, metadata={"format": "pt"}),
        CONFIG: lambda path: write_text(path, json.dumps(config, indent=2, sort_keys=True)),
    }
    if not (folder / "README.md").exists():
        writers["README.md"] = lambda path: write_text(path, _card(name, adapter))
    write_files(folder, writers)
    return folder


def peft_tensors(adapter: Adapter) -> dict[str, mx.array]:
    """The adapter's tensors under PEFT's keys, evaluated and checked.

    Where several processes hold the model together all of them call it, unless the adapter's arrays are whole just now.

    Raises:
        AdapterError: A key is missing or left over, a shape is wrong, or a value is NaN or infinite.
    """
    slots = dict(slots_of(adapter))
    if adapter.loaded.resized:
        carried = carried_slots(adapter.loaded, adapter.blueprint)
        slots = {key: slot for key, slot in carried.items() if slot.mlx_path} | slots
    held = dict(tree_flatten(adapter.loaded.model.parameters()))
    if adapter.split is not None:
        held |= adapter.split.complete(held)
    untold = sorted(set(adapter.trainable()) - {slot.mlx_path for slot in slots.values()})
    absent = sorted(key for key, slot in slots.items() if not slot.idle and slot.mlx_path not in held)
    absent += sorted(adapter.idle.keys() ^ {key for key, slot in slots.items() if slot.idle})
    if untold or absent:
        raise AdapterError(
            f"trained but unknown to PEFT: {untold[:3]}; expected by PEFT but not there: {absent[:3]}",
            "exactly the tensors that adapter_config.json calls for",
            "this is a fault of hf_mlx, please report it with the LoraConfig",
        )
    tensors = {
        key: adapter.idle[key] if slot.idle else _to_stored(adapter.loaded, slot, held[slot.mlx_path])
        for key, slot in slots.items()
    }
    # Arrays may still be reads of the file that is about to be replaced.
    mx.eval(tensors)
    _check(tensors, slots)
    return tensors


def _to_stored(loaded: LoadedModel, slot: Slot, value: mx.array) -> mx.array:
    if slot.as_stored:
        plain = slot.mlx_path.replace(".base_layer.", ".")
        return next(iter(loaded.names.export_weights({plain: value}).values()))
    return value


def _check(tensors: Mapping[str, mx.array], slots: Mapping[str, Slot]) -> None:
    for key, value in tensors.items():
        if tuple(value.shape) != slots[key].shape:
            raise AdapterError(
                f"{key} of shape {tuple(value.shape)}",
                f"shape {slots[key].shape}",
                "this is a fault of hf_mlx, please report it with the LoraConfig",
            )
        if not mx.isfinite(value).all().item():
            raise AdapterError(
                f"{key} holds NaN or infinite values",
                "finite weights (an adapter with NaN loads without complaint and answers nonsense)",
                "go back to an earlier checkpoint, with a lower learning_rate or max_grad_norm=1.0",
            )


def _card(base: str, adapter: Adapter) -> str:
    torch_class, labels = adapter.torch_class, ", num_labels=1" if adapter.loaded.scores else ""
    lines = [
        "---",
        f"base_model: {json.dumps(base)}",
        "library_name: peft",
        "tags:",
        f"- {json.dumps(f'base_model:adapter:{base}')}",
        "- lora",
        "- transformers",
        "---",
        "",
        f"A LoRA adapter for `{base}`, trained with hf_mlx.",
        "",
        "```python",
        "from peft import PeftModel",
        f"from transformers import {torch_class}",
        "",
        f"model = {torch_class}.from_pretrained({base!r}{labels})",
        'model = PeftModel.from_pretrained(model, "path/to/this/folder")',
        "```",
        "",
        f"### Framework versions\n\n- PEFT {FORMAT} format",
    ]
    return "\n".join(lines) + "\n"
