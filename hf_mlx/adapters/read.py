"""Adapters in: attach what PEFT trained elsewhere, to evaluate it or to go on training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from ..errors import AdapterError
from ..settings.plan import LoraPlan, ModelPlan, PrecisionPlan
from .adapter import Adapter
from .attach import install_layers, make_adapter
from .blueprint import Blueprint
from .config import config_from_json
from .decomposed import KINDS, take_out
from .mlx_lm_read import is_mlx_lm, read_mlx_lm
from .per_expert import find_apart, join_experts
from .score_head import check_task
from .slots import Slot, list_slots
from .source import CONFIG, has_pickle_only, read_config_file, read_pickle, read_shapes, read_tensors
from .tying import keep_tied
from .vocabulary import carried_slots, draw_untied, put_carried

if TYPE_CHECKING:
    from ..models.load import LoadedModel


def import_adapter(folder: str | Path, model: Any) -> Adapter:
    """Attach an adapter that PEFT, this library or mlx-lm's tuner saved.

    Args:
        folder: The adapter's folder.
        model: A loaded model, anything that has one as ``loaded``, or a folder or hub id, which is
            loaded in the dtype it is stored in.

    Returns:
        The adapter, its weights trainable; ``adapter.loaded.model`` computes with it.

    Raises:
        AdapterError: The folder is not a complete, sound LoRA adapter for this model. The model is then unchanged.
    """
    from ..models.load import LoadedModel, load_model

    if isinstance(model, (str, Path)):
        model = load_model(model, ModelPlan(precision=_stored_precision(model)))
    loaded = model if isinstance(model, LoadedModel) else getattr(model, "loaded", None)
    if not isinstance(loaded, LoadedModel):
        raise AdapterError(
            f"model of type {type(model).__name__}",
            "a folder, a hub id or a loaded model",
            'import_adapter(dir, "HuggingFaceTB/SmolLM2-135M")',
        )
    return read_adapter(folder, loaded)


def _stored_precision(model: str | Path) -> PrecisionPlan:
    from ..models.config import read_config
    from ..models.source import resolve_folder

    config = read_config(resolve_folder(model, ModelPlan()))
    dtype = config.get("dtype") or config.get("torch_dtype")
    return PrecisionPlan(dtype=dtype) if dtype in ("float16", "bfloat16") else PrecisionPlan()


def recorded_base(folder: str | Path) -> str:
    """The base model that an adapter's config names.

    Raises:
        AdapterError: It names none.
    """
    folder = Path(folder).expanduser()
    config = read_config_file(folder)
    key = "model" if is_mlx_lm(config) else "base_model_name_or_path"
    base = config.get(key)
    if not isinstance(base, str) or not base:
        raise AdapterError(
            f"{folder / CONFIG}: {key}={base!r}",
            "the base model it was trained on",
            "name it: --base OWNER/MODEL",
        )
    return base


def read_adapter(folder: str | Path, loaded: LoadedModel, *, compute_dtype: mx.Dtype = mx.float32) -> Adapter:
    """Attach a saved adapter to ``loaded``, in place.

    Every key is accounted for, every shape and value checked, before the model is touched.

    Args:
        folder: With adapter_config.json and adapter_model.safetensors (or .bin, where torch can read it safely).
        loaded: The base it was trained on.
        compute_dtype: Dtype of the low-rank products, as for :func:`hf_mlx.adapters.attach.attach`.

    Raises:
        AdapterError: As for :func:`import_adapter`.
    """
    folder = Path(folder).expanduser()
    if is_mlx_lm(config := read_config_file(folder)):
        return read_mlx_lm(folder, config, loaded, compute_dtype=compute_dtype)
    plan, blueprint, slots, tensors = open_adapter(folder, loaded)
    layers = install_layers(loaded, plan, blueprint, compute_dtype)
    if plan.init_lora_weights in KINDS:
        take_out(layers.values(), str(plan.init_lora_weights))
    held = dict(tree_flatten(loaded.model.parameters()))
    values = _to_parameters(loaded, slots, tensors, held)
    loaded.model.update(tree_unflatten(list(values.items())))
    mx.eval([layer.parameters() for layer in layers.values()])
    idle = {key: tensors[key].astype(mx.float32) for key, slot in slots.items() if slot.idle}
    mx.eval(idle)
    return dataclasses.replace(make_adapter(loaded, plan, blueprint, idle), folder=folder)


def open_adapter(folder: Path, loaded: LoadedModel) -> tuple[LoraPlan, Blueprint, dict[str, Slot], dict[str, mx.array]]:
    """Everything :func:`read_adapter` checks, without attaching: plan, blueprint, slots and tensors by PEFT key.

    The ends of the vocabulary that travel with the adapter are put into ``loaded``, whose head is untied for it.
    """
    plan = keep_tied(loaded, config_from_json(read_config_file(folder), str(folder / CONFIG)))
    check_task(loaded, plan, folder)
    pickled = read_pickle(folder) if has_pickle_only(folder) else None
    shapes = read_shapes(folder) if pickled is None else {key: tuple(v.shape) for key, v in pickled.items()}
    tensors = cache(lambda: read_tensors(folder) if pickled is None else pickled)
    # The ends decide how many rows everything else has; whatever does not fit then undoes them.
    undo = put_carried(loaded, plan, shapes, tensors, folder)
    try:
        blueprint = draw_untied(loaded, plan)
        plan = blueprint.plan
        stacks = find_apart(loaded, blueprint, shapes)
        if stacks:
            whole = join_experts(stacks, tensors())
            shapes = {key: tuple(value.shape) for key, value in whole.items()}
            tensors = cache(lambda: whole)
        slots = list_slots(loaded, plan, blueprint)
        _account(shapes, carried_slots(loaded, blueprint) | slots, slots, folder, loaded)
        return plan, blueprint, slots, tensors()
    except BaseException:
        if undo is not None:
            undo()
        raise


def _account(
    shapes: Mapping[str, tuple[int, ...]],
    known: Mapping[str, Slot],
    slots: Mapping[str, Slot],
    folder: Path,
    loaded: LoadedModel,
) -> None:
    missing = [key for key, slot in slots.items() if key not in shapes and not slot.base]
    unexpected = [key for key in shapes if key not in known]
    wrong = [key for key in shapes if key in known and shapes[key] != known[key].shape]
    if wrong:
        raise AdapterError(
            f"{folder}: {wrong[0]} of shape {shapes[wrong[0]]} ({len(wrong)} such tensor(s))",
            f"shape {known[wrong[0]].shape}, which {loaded.path} and {CONFIG} call for",
            "the base it was trained on, with its own adapter_config.json",
        )
    if missing or unexpected:
        what = [f"{len(missing)} key(s) missing, first {missing[0]}"] if missing else []
        what += [f"{len(unexpected)} key(s) unexpected, first {unexpected[0]}"] if unexpected else []
        raise AdapterError(
            f"{folder}: {'; '.join(what)}",
            f"exactly the {len(slots)} tensors that {CONFIG} calls for on {loaded.path}",
            "the base it was trained on, and the adapter_config.json saved with these weights",
        )


def _to_parameters(
    loaded: LoadedModel,
    slots: Mapping[str, Slot],
    tensors: Mapping[str, mx.array],
    held: Mapping[str, mx.array],
) -> dict[str, mx.array]:
    values: dict[str, mx.array] = {}
    for key, slot in slots.items():
        if key not in tensors or slot.base or slot.idle:
            continue
        value = tensors[key].astype(held[slot.mlx_path].dtype)
        if slot.as_stored:
            plain = slot.mlx_path.replace(".base_layer.", ".")
            values[slot.mlx_path] = loaded.names.import_weights({loaded.names.to_hf_name(plain): value})[plain]
        else:
            values[slot.mlx_path] = value
    return values
