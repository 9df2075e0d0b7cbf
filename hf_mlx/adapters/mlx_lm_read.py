"""mlx-lm's own adapter folders, in; :mod:`.mlx_lm_folder` has the way out, and the format."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx.utils import tree_unflatten

from ..errors import AdapterError, ModelError
from ..models.weights import read_header
from ..settings.plan import LoraPlan
from .adapter import Adapter
from .attach import install_layers, make_adapter
from .blueprint import draw_blueprint
from .layers import layer_dims
from .matching import minimal_names
from .per_expert import join_a, join_b
from .sites import Site, list_sites
from .source import CONFIG, check_finite, inside
from .targets import Target

if TYPE_CHECKING:
    from ..models.load import LoadedModel

WEIGHTS = "adapters.safetensors"
_LEAVES = ("lora_a", "lora_b", "m")


def is_mlx_lm(config: Mapping[str, Any]) -> bool:
    """Whether an adapter_config.json is mlx-lm's."""
    return "peft_type" not in config and ("lora_parameters" in config or "fine_tune_type" in config)


def read_mlx_lm(folder: Path, config: Mapping[str, Any], loaded: LoadedModel, *, compute_dtype: mx.Dtype) -> Adapter:
    """Attach an adapter that mlx-lm's tuner saved; the model changes only when all of it is sound.

    Args:
        folder: With adapter_config.json and adapters.safetensors.
        config: The parsed adapter_config.json.
        loaded: The base it was trained on.
        compute_dtype: As for :func:`hf_mlx.adapters.read.read_adapter`.

    Raises:
        AdapterError: A full fine-tune, a module that is not there or that PEFT cannot adapt, a wrong shape, a NaN.
    """
    rank, scale, dropout = _parameters(folder, config)
    tensors = _read(folder)
    found = {path.rpartition(".")[0] for path in tensors}
    sites = {site.mlx_path: site for site in list_sites(loaded)}
    unknown = sorted(found - {path for site in sites.values() for path in _paths(site)})
    if unknown:
        raise AdapterError(
            f"{folder}: {unknown[0]} ({len(unknown)} such module(s))",
            f"modules of {loaded.path}",
            "the base it was trained on: hf-mlx export ADAPTER OUTPUT --base OWNER/MODEL",
        )
    named = [site.hf_path for path, site in sites.items() if path in found and site.kind != "experts"]
    others = [site.hf_path for site in sites.values() if site.kind != "experts"]
    stacks = _stacks(folder, found, sites.values())
    plan = LoraPlan(
        r=rank,
        lora_alpha=scale * rank,
        lora_dropout=dropout,
        target_modules=tuple(minimal_names(named, others)),
        target_parameters=tuple(site.hf_path for site in stacks) or None,
        rank_pattern={re.escape(site.hf_path): rank * len(site.modules) for site in stacks if site.parts},
        alpha_pattern={re.escape(site.hf_path): scale * rank * len(site.modules) for site in stacks if site.parts},
        use_dora=config.get("fine_tune_type") == "dora",
        task_type="CAUSAL_LM",
    )
    blueprint = draw_blueprint(loaded, plan)
    plan = blueprint.plan
    values = _values(folder, tensors, blueprint.targets, sites, plan)
    install_layers(loaded, plan, blueprint, compute_dtype)
    loaded.model.update(tree_unflatten(list(values.items())))
    mx.eval(loaded.model.trainable_parameters())
    return make_adapter(loaded, plan, blueprint)


def _stacks(folder: Path, found: set[str], sites: Iterable[Site]) -> list[Site]:
    """The stacks of experts whose every part was adapted; PEFT has one pair for gate and up projection."""
    chosen = [site for site in sites if site.kind == "experts" and not found.isdisjoint(_paths(site))]
    for site in chosen:
        lost = [path for path in _paths(site) if path not in found]
        if lost:
            raise AdapterError(
                f"{folder}: experts adapted in part, without {lost[0]}",
                "gate and up projection together: PEFT holds them as one matrix",
                "train it with both among mlx-lm's keys",
            )
    return chosen


def _paths(site: Site) -> list[str]:
    return [site.mlx_path, *(path for path, _ in site.parts)]


def _parameters(folder: Path, config: Mapping[str, Any]) -> tuple[int, float, float]:
    kind, given = config.get("fine_tune_type", "lora"), config.get("lora_parameters")
    if kind not in ("lora", "dora"):
        raise AdapterError(
            f"{folder / CONFIG}: fine_tune_type={kind!r}",
            'an adapter: fine_tune_type "lora" or "dora"',
            "fuse it into a model: mlx_lm.fuse --model BASE --adapter-path FOLDER",
        )
    given = given if isinstance(given, Mapping) else {}
    rank, scale, dropout = given.get("rank"), given.get("scale"), given.get("dropout", 0.0)
    number = (int, float)
    sound = isinstance(rank, int) and not isinstance(rank, bool) and rank > 0
    sound = sound and all(isinstance(v, number) and not isinstance(v, bool) for v in (scale, dropout))
    if not sound or not math.isfinite(scale) or scale == 0 or not 0 <= dropout < 1:  # pyright: ignore
        raise AdapterError(
            f"{folder / CONFIG}: lora_parameters={config.get('lora_parameters')!r}",
            "a positive whole rank, a scale and a dropout below 1",
            '"lora_parameters": {"rank": 8, "scale": 20.0, "dropout": 0.0}',
        )
    return rank, float(scale), float(dropout)  # pyright: ignore


def _read(folder: Path) -> dict[str, mx.array]:
    path = inside(folder, WEIGHTS)
    if not path.is_file():
        raise AdapterError(
            f"{folder}: no {WEIGHTS}", "the weights beside mlx-lm's config", "fetch the whole adapter folder again"
        )
    try:
        header, _ = read_header(path)
    except ModelError as error:
        raise AdapterError(error.received, error.required, "fetch the adapter again, or save it again") from error
    strange = [key for key in header if key.rpartition(".")[2] not in _LEAVES]
    if strange or not header:
        raise AdapterError(
            f"{path}: {strange[0] if strange else 'no tensor'}",
            f"tensors that end in {', '.join(_LEAVES)}",
            "the folder that mlx_lm.lora wrote to --adapter-path",
        )
    tensors: dict[str, mx.array] = dict(mx.load(str(path)))  # pyright: ignore
    check_finite(tensors, str(path))
    return tensors


def _values(
    folder: Path,
    tensors: Mapping[str, mx.array],
    targets: Iterable[Target],
    sites: Mapping[str, Any],
    plan: LoraPlan,
) -> dict[str, mx.array]:
    values: dict[str, mx.array] = {}
    read = 0
    for target in targets:
        site = sites[target.mlx_path]
        read += len(target.paths) * (3 if plan.use_dora else 2)
        if target.kind == "experts":
            pairs = [
                [
                    _tensor(folder, tensors, f"{path}.lora_a", (site.experts, plan.r, layer_dims(module)[0])),
                    _tensor(folder, tensors, f"{path}.lora_b", (site.experts, layer_dims(module)[1], plan.r)),
                ]
                for path, module in zip(target.paths, site.modules, strict=True)
            ]
            values[f"{target.mlx_path}.lora_A"] = join_a([a for a, _ in pairs])
            values[f"{target.mlx_path}.lora_B"] = join_b([b for _, b in pairs])
            continue
        inputs, outputs = layer_dims(site.module)
        names = {"lora_a": (inputs, plan.r), "lora_b": (plan.r, outputs)}
        names |= {"m": (outputs,)} if plan.use_dora else {}
        for leaf, shape in names.items():
            value = _tensor(folder, tensors, f"{target.mlx_path}.{leaf}", shape)
            values[f"{target.mlx_path}.{_OURS[target.kind == 'embedding'][leaf]}"] = (
                mx.contiguous(value.T) if leaf != "m" else value
            )
    if read != len(tensors):
        known = {f"{path}.{leaf}" for t in targets for path in t.paths for leaf in _LEAVES[: 3 if plan.use_dora else 2]}
        left = sorted(set(tensors) - known)
        raise AdapterError(
            f"{folder / WEIGHTS}: {len(tensors)} tensors{f', {left[0]} among them' if left else ''}",
            f"the {read} that {CONFIG} and the base call for",
            "the base it was trained on, with its own adapter_config.json",
        )
    return values


def _tensor(folder: Path, tensors: Mapping[str, mx.array], key: str, shape: tuple[int, ...]) -> mx.array:
    held = tuple(tensors[key].shape) if key in tensors else None
    if held != shape:
        raise AdapterError(
            f"{folder / WEIGHTS}: {key} {'is not there' if held is None else f'of shape {held}'}",
            f"shape {shape}, which the base and {CONFIG} call for",
            "the base it was trained on, with its own adapter_config.json",
        )
    return tensors[key].astype(mx.float32)


_OURS = (
    {"lora_a": "lora_A", "lora_b": "lora_B", "m": "lora_magnitude_vector"},
    {"lora_a": "lora_embedding_A", "lora_b": "lora_embedding_B"},
)
