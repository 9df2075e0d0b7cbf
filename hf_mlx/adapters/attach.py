"""Put a LoraConfig onto a loaded model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from ..settings.plan import LoraPlan
from .adapter import Adapter
from .blueprint import Blueprint
from .decomposed import KINDS, take_out
from .defaults import CONV1D_TYPES
from .idle import IdlePair
from .layers import DoRALinear, LoRAEmbedding, LoRALinear
from .parts import LoRALatent, LoRAPart, LoRARouter, LoRASwitchLinear, SplitLoRALinear, part_dims, split_rows
from .score_head import save_head
from .sites import Site
from .start import LoRALayer, count_loading_draws, start_as_mlx_lm, start_as_peft
from .targets import Target
from .token_rows import TrainableTokens
from .tying import keep_tied
from .vocabulary import draw_untied

if TYPE_CHECKING:
    from ..models.load import LoadedModel


def attach(
    loaded: LoadedModel,
    plan: LoraPlan,
    *,
    seed: int,
    compute_dtype: mx.Dtype = mx.float32,
    last_n_layers: int | None = None,
    start: Literal["peft", "mlx_lm"] = "peft",
    seeded_before_loading: bool = False,
) -> Adapter:
    """Freeze the model and give it trainable LoRA layers, in place.

    Args:
        loaded: The model to adapt.
        plan: What to adapt and how.
        seed: The run's seed; the first values are those of PEFT after ``transformers.set_seed(seed)``.
        compute_dtype: Dtype of the low-rank products: the autocast dtype, or fp32 without autocast.
        last_n_layers: Adapt only this many decoder blocks, counted from the end.
        start: ``"peft"``, or ``"mlx_lm"`` for the values mlx-lm's own tuner starts from.
        seeded_before_loading: The first values are those of ``set_seed; from_pretrained; get_peft_model``, which is
            trl's order, and not of ``from_pretrained; set_seed; get_peft_model``.

    Returns:
        The adapter. The model computes exactly what it did before, until it is trained
        (unless ``init_lora_weights=False`` asks for random values).

    Raises:
        AdapterError: Nothing matches, a module cannot be adapted, or settings contradict each other.
    """
    plan = save_head(loaded, keep_tied(loaded, plan))
    blueprint = draw_untied(loaded, plan, last_n_layers)
    plan = blueprint.plan
    layers = install_layers(loaded, plan, blueprint, compute_dtype)
    idle = {target.key: IdlePair(target) for target in blueprint.idle}
    if start == "mlx_lm":
        start_as_mlx_lm(loaded.model, layers, last_n_layers, seed)
    else:
        drawn = count_loading_draws(loaded) if seeded_before_loading else 0
        pairs = [idle[target.key] if target.idle else layers[target.mlx_path] for target in blueprint.wrapped]
        start_as_peft(pairs, plan, seed, drawn=drawn)
        if plan.init_lora_weights in KINDS and not loaded.decomposed:
            take_out(layers.values(), str(plan.init_lora_weights))
    return make_adapter(loaded, plan, blueprint, {k: v for pair in idle.values() for k, v in pair.tensors().items()})


def install_layers(
    loaded: LoadedModel, plan: LoraPlan, blueprint: Blueprint, compute_dtype: mx.Dtype
) -> dict[str, LoRALayer]:
    """Freeze the model, replace the targets by LoRA layers of zeros and unfreeze what is trained in full.

    Returns:
        MLX path to the new layer that has a pair, in HF order.
    """
    sites = {site.mlx_path: site for site in blueprint.sites}
    layers: dict[str, LoRALayer] = {}
    parts: dict[str, LoRAPart] = {}
    for target in blueprint.targets:
        layer, others = _make_layers(sites[target.mlx_path], target, plan, compute_dtype)
        layers[target.mlx_path] = layer
        parts |= zip(target.parts, others, strict=True)
    rows = {chosen.site.mlx_path: TrainableTokens(chosen.site.module, chosen.indices) for chosen in blueprint.rows}
    loaded.model.freeze()
    loaded.model.update_modules(tree_unflatten([*layers.items(), *parts.items(), *rows.items()]))
    for site in blueprint.saved:
        site.module.unfreeze()
    for site in blueprint.biased:
        site.module.unfreeze(recurse=False, keys=["bias"])
    loaded.freeze_buffers()
    # A new layer is in training mode; the model decides.
    loaded.model.train(loaded.model.training)
    return layers


def make_adapter(
    loaded: LoadedModel, plan: LoraPlan, blueprint: Blueprint, idle: dict[str, mx.array] | None = None
) -> Adapter:
    """The handle to what :func:`install_layers` put into the model."""
    return Adapter(
        plan=plan,
        loaded=loaded,
        blueprint=blueprint,
        idle=idle or {},
        conv1d=loaded.model_type in CONV1D_TYPES,
    )


def _make_layers(
    site: Site, target: Target, plan: LoraPlan, compute_dtype: mx.Dtype
) -> tuple[LoRALayer, list[LoRAPart]]:
    """The layer with the pair, and what goes around the site's further parts."""
    base, (rows, *further) = site.module, split_rows(site.modules, strided=site.strided)
    if target.kind == "embedding":
        return LoRAEmbedding(base, target.r, target.scale, compute_dtype), []
    if target.kind == "router" and not isinstance(base, (nn.Linear, nn.QuantizedLinear)):
        return LoRARouter(base, target.r, target.scale, compute_dtype), []
    dims = part_dims(site.modules)
    if target.kind == "experts":
        layer = LoRASwitchLinear(
            base, target.r, target.scale, experts=site.experts, dims=dims, rows=rows, compute_dtype=compute_dtype
        )
    elif site.parts:
        kind = LoRALatent if rows.turned else SplitLoRALinear
        layer = kind(
            base,
            target.r,
            target.scale,
            dropout=plan.lora_dropout,
            compute_dtype=compute_dtype,
            dims=dims,
            rows=rows,
        )
    else:
        kind = DoRALinear if plan.use_dora else LoRALinear
        layer = kind(
            base, target.r, target.scale, dropout=plan.lora_dropout, bias=plan.lora_bias, compute_dtype=compute_dtype
        )
    modules = (module for _, module in site.parts)
    return layer, [LoRAPart(module, layer, cut) for module, cut in zip(modules, further, strict=True)]
