"""Which tensors a PEFT adapter file must hold for a given model and config, and where each one goes.

Both directions are checked against this list, which is made from the blueprint alone: the exporter proves
its own tensors against it before writing, the reader accounts for every key before the model is touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..models.vocabulary import head_path
from ..settings.plan import LoraPlan
from .adapter import PEFT_LEAVES, PREFIX, Adapter
from .blueprint import Blueprint
from .layers import layer_dims
from .matching import is_all_linear, is_matched
from .parts import part_dims
from .sites import HEADS, Site, is_tied
from .targets import Target

if TYPE_CHECKING:
    from ..models.load import LoadedModel

_EMBEDDINGS = ("embed_tokens", "lm_head")  # peft.utils.constants.EMBEDDING_LAYER_NAMES


@dataclass(frozen=True)
class Slot:
    """One tensor of an adapter file.

    Attributes:
        mlx_path: The MLX parameter it belongs to, once the adapter is attached.
        shape: In the file.
        base: It is a weight of the base that may travel along (embeddings), not a trained one.
        idle: It belongs to no layer of the MLX model; the adapter keeps it.
        as_stored: It is a base parameter, kept in HF's own name and layout and in the base's dtype.
    """

    mlx_path: str
    shape: tuple[int, ...]
    base: bool = False
    as_stored: bool = False
    idle: bool = False

    @property
    def plain(self) -> str:
        """The MLX parameter's path before an adapter was put around it."""
        return self.mlx_path.replace(".base_layer.", ".")


def list_slots(loaded: LoadedModel, plan: LoraPlan, blueprint: Blueprint) -> dict[str, Slot]:
    """PEFT key → slot, for every tensor that PEFT would write and read."""
    slots: dict[str, Slot] = {}
    modules = {site.mlx_path: site for site in blueprint.sites}
    embeddings = _saves_embeddings(plan, blueprint)
    for target in blueprint.targets:
        site = modules[target.mlx_path]
        slots |= _slots(target, site, plan)
        leaf = target.hf_path.rsplit(".", 1)[-1]
        if embeddings and leaf in _EMBEDDINGS + HEADS and "scales" not in site.module:
            slots |= _base_slots(site)
    for target in blueprint.idle:
        slots |= {f"{PREFIX}{target.key}.{leaf}.weight": shape for leaf, shape in _idle_shapes(target).items()}
    for site in blueprint.saved:
        slots |= _saved_slots(loaded, site)
        if plan.ensure_weight_tying and site.kind == "embedding" and is_tied(loaded):
            # PEFT wraps the head around the same copy and writes it a second time.
            head = loaded.names.to_hf_module(head_path(loaded))
            shape = tuple(site.module["weight"].shape)
            slots[f"{PREFIX}{head}.weight"] = Slot(f"{site.mlx_path}.weight", shape, as_stored=True)
    for rows in blueprint.rows:
        module: Any = rows.site.module
        shape = (len(rows.indices), module.weight.shape[1])
        leaf = "trainable_tokens_delta"
        slots[f"{PREFIX}{rows.site.hf_path}.{PEFT_LEAVES[leaf]}"] = Slot(f"{rows.site.mlx_path}.{leaf}", shape)
    adapted = {target.mlx_path for target in blueprint.targets}
    for site in blueprint.biased:
        leaf = "base_layer.bias" if site.mlx_path in adapted else "bias"
        shape = tuple(site.module["bias"].shape)
        slots[f"{PREFIX}{site.hf_path}.{leaf}"] = Slot(f"{site.mlx_path}.{leaf}", shape, as_stored=True)
    return slots


def slots_of(adapter: Adapter) -> Mapping[str, Slot]:
    """:func:`list_slots` of an attached adapter."""
    if adapter.split is not None:
        # The model's arrays are parts.
        return adapter.split.slots
    return list_slots(adapter.loaded, adapter.plan, adapter.blueprint)


def _idle_shapes(target: Target) -> dict[str, Slot]:
    inputs, outputs = target.idle or (0, 0)
    return {
        "lora_A": Slot("", (target.r, inputs), idle=True),
        "lora_B": Slot("", (outputs, target.r), idle=True),
    }


def _slots(target: Target, site: Site, plan: LoraPlan) -> dict[str, Slot]:
    inputs, outputs = layer_dims(site.module) if target.kind == "embedding" else part_dims(site.modules)
    stacked = site.experts or 1
    if target.kind == "embedding":
        shapes: dict[str, tuple[int, ...]] = {
            "lora_embedding_A": (target.r, inputs),
            "lora_embedding_B": (outputs, target.r),
        }
    else:
        shapes = {"lora_A": (target.r * stacked, inputs), "lora_B": (outputs, target.r * stacked)}
        if plan.lora_bias:
            shapes["lora_B_bias"] = (outputs,)
        if plan.use_dora:
            shapes["lora_magnitude_vector"] = (outputs,)
    return {
        f"{PREFIX}{target.key}.{PEFT_LEAVES[leaf]}": Slot(f"{target.mlx_path}.{leaf}", shape)
        for leaf, shape in shapes.items()
    }


def _base_slots(site: Site) -> dict[str, Slot]:
    leaves = [leaf for leaf in ("weight", "bias") if isinstance(site.module.get(leaf), mx.array)]
    return {
        f"{PREFIX}{site.hf_path}.base_layer.{leaf}": Slot(
            f"{site.mlx_path}.base_layer.{leaf}", tuple(site.module[leaf].shape), base=True, as_stored=True
        )
        for leaf in leaves
    }


def _saved_slots(loaded: LoadedModel, saved: Site) -> dict[str, Slot]:
    slots = {}
    params: Any = tree_flatten(saved.module.parameters())
    for name, value in params:
        path = f"{saved.mlx_path}.{name}"
        module, _, leaf = path.rpartition(".")
        stored = loaded.names.export_weights({path: value})
        shape = tuple(next(iter(stored.values())).shape)
        hf_path = loaded.names.to_hf_module(module)
        slots[f"{PREFIX}{hf_path}.{leaf}"] = Slot(path, shape, as_stored=True)
    return slots


def _saves_embeddings(plan: LoraPlan, blueprint: Blueprint) -> bool:
    # peft.utils.save_and_load.get_peft_model_state_dict, save_embedding_layers="auto".
    selector = blueprint.selector
    if is_all_linear(selector) or plan.trainable_token_indices is not None:
        return False
    if isinstance(selector, str):
        named = (site.hf_path for site in blueprint.sites if site.hf_path.rsplit(".", 1)[-1] in _EMBEDDINGS)
        return any(is_matched(plan, selector, path) for path in named)
    return any(name in selector for name in _EMBEDDINGS)
