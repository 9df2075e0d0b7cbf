"""mlx-lm's own adapter folders, out and in: what ``mlx_lm.generate --adapter-path`` loads.

Source of the format: ``mlx_lm.tuner.utils.linear_to_lora_layers`` and ``load_adapters`` (mlx-lm 0.32). One rank, one
scale and one dropout hold for all modules; ``keys`` name modules below a decoder layer, or in full.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping
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
from .files import write_files, write_text
from .matching import minimal_names
from .mlx_lm_check import check_in_mlx_lm
from .origin import resolve_origin
from .sites import list_sites
from .source import CONFIG, check_finite, inside
from .targets import Target

if TYPE_CHECKING:
    from ..models.load import LoadedModel

WEIGHTS = "adapters.safetensors"
_LEAVES = ("lora_a", "lora_b", "m")


def write_mlx_lm(adapter: Adapter, folder: str | Path, *, base: str | None = None) -> Path:
    """Write an adapter as mlx-lm's tuner does.

    Modules of a smaller rank are filled up with zeros, and a module's own scale goes into its second matrix, so
    that ranks, alphas and layers that differ mean the same there. Before anything is written, mlx-lm loads it and
    its logits are compared with ours.

    Args:
        adapter: What to write; it stays as it is.
        folder: Where to write; files of other names in it are left alone.
        base: Name of the base to record; found out where not given.

    Returns:
        The folder.

    Raises:
        AdapterError: It trained something that mlx-lm's format has no place for, a value is not finite, or mlx-lm
            computes something else with it.
    """
    folder = Path(folder)
    _refuse_what_has_no_place(adapter, folder)
    if base is None:
        # A base quantised for MLX is the one to load here, not the one it was made from.
        quantized = bool(adapter.loaded.config.get("quantization"))
        base = str(adapter.loaded.path) if quantized else resolve_origin(adapter.loaded)[0]
    rank = max(target.r for target in adapter.targets)
    scale = adapter.targets[0].scale
    tensors = _tensors(adapter, rank, scale)
    check_finite(tensors, "the adapter")
    keys, layers = _keys(adapter)
    config = {
        "fine_tune_type": "dora" if adapter.plan.use_dora else "lora",
        "lora_parameters": {"dropout": adapter.plan.lora_dropout, "keys": keys, "rank": rank, "scale": scale},
        "model": base,
        "num_layers": layers,
    }
    writers: dict[str, Callable[[Path], None]] = {
        WEIGHTS: lambda path: mx.save_safetensors(str(path), tensors, metadata={"format": "mlx"}),
        CONFIG: lambda path: write_text(path, json.dumps(config, indent=4, sort_keys=True)),
    }
    with tempfile.TemporaryDirectory() as trial:
        write_files(trial, writers)
        check_in_mlx_lm(adapter, Path(trial))
    write_files(folder, writers)
    return folder


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
    unknown = sorted(found - set(sites))
    if unknown:
        raise AdapterError(
            f"{folder}: {unknown[0]} ({len(unknown)} such module(s))",
            f"modules of {loaded.path}",
            "the base it was trained on: hf-mlx export ADAPTER OUTPUT --base OWNER/MODEL",
        )
    hf_paths = [site.hf_path for path, site in sites.items() if path in found]
    plan = LoraPlan(
        r=rank,
        lora_alpha=scale * rank,
        lora_dropout=dropout,
        target_modules=tuple(minimal_names(hf_paths, (site.hf_path for site in sites.values()))),
        use_dora=config.get("fine_tune_type") == "dora",
        task_type="CAUSAL_LM",
    )
    blueprint = draw_blueprint(loaded, plan)
    values = _values(folder, tensors, blueprint.targets, sites, plan)
    install_layers(loaded, plan, blueprint, compute_dtype)
    loaded.model.update(tree_unflatten(list(values.items())))
    mx.eval(loaded.model.trainable_parameters())
    return make_adapter(loaded, plan, blueprint)


def _refuse_what_has_no_place(adapter: Adapter, folder: Path) -> None:
    blueprint = adapter.blueprint
    extra = {
        "modules_to_save": [site.hf_path for site in blueprint.saved],
        f"bias={adapter.plan.bias!r}": [site.hf_path for site in blueprint.biased],
        "lora_bias=True": [target.hf_path for target in blueprint.targets] if adapter.plan.lora_bias else [],
    }
    for name, paths in extra.items():
        if paths:
            raise AdapterError(
                f"an adapter with {name}, which trained {paths[0]}",
                "LoRA or DoRA matrices only: mlx-lm's adapter format has no place for more",
                f"a merged model, which mlx-lm loads as it is: hf-mlx merge ADAPTER {folder}",
            )


def _tensors(adapter: Adapter, rank: int, scale: float) -> dict[str, mx.array]:
    modules = dict(adapter.loaded.model.named_modules())
    tensors: dict[str, mx.array] = {}
    for target in adapter.targets:
        layer: Any = modules[target.mlx_path]
        embedding = target.kind == "embedding"
        a = layer.lora_embedding_A if embedding else layer.lora_A
        b = layer.lora_embedding_B if embedding else layer.lora_B
        if target.scale != scale:
            b = b * (target.scale / scale)
        a, b = _filled(a, -2, rank), _filled(b, -1, rank)
        # mlx-lm keeps an expert's matrices as PEFT does, and all others transposed.
        if target.kind != "experts":
            a, b = mx.contiguous(a.T), mx.contiguous(b.T)
        tensors |= {f"{target.mlx_path}.lora_a": a, f"{target.mlx_path}.lora_b": b}
        if "lora_magnitude_vector" in layer:
            tensors[f"{target.mlx_path}.m"] = layer.lora_magnitude_vector
    return tensors


def _filled(matrix: mx.array, axis: int, rank: int) -> mx.array:
    widths = [(0, 0)] * matrix.ndim
    widths[axis] = (0, rank - matrix.shape[axis])
    return mx.pad(matrix, widths) if widths[axis][1] else matrix


def _keys(adapter: Adapter) -> tuple[list[str], int]:
    """``keys`` and ``num_layers``: names below a layer where they say it all, else full paths."""
    model: Any = adapter.loaded.model
    modules = {path: module for path, module in model.named_modules()}
    prefixes = {id(module): path for path, module in modules.items()}
    layers = [prefixes[id(layer)] for layer in model.layers]
    chosen = {target.mlx_path for target in adapter.targets}
    inside_layers = {path: layer for path in chosen for layer in layers if path.startswith(f"{layer}.")}
    names = {path.removeprefix(f"{layer}.") for path, layer in inside_layers.items()}
    first = min((layers.index(layer) for layer in inside_layers.values()), default=0)
    selected = {f"{layer}.{name}" for layer in layers[first:] for name in names} & set(modules)
    if names and selected == set(inside_layers):
        return sorted(names | (chosen - selected)), len(layers) - first
    return sorted(chosen), len(layers)


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
    from .layers import layer_dims

    values: dict[str, mx.array] = {}
    for target in targets:
        inputs, outputs = layer_dims(sites[target.mlx_path].module)
        names = {"lora_a": (inputs, plan.r), "lora_b": (plan.r, outputs)}
        if target.kind == "experts":
            experts = sites[target.mlx_path].module.num_experts
            names = {"lora_a": (experts, plan.r, inputs), "lora_b": (experts, outputs, plan.r)}
        names |= {"m": (outputs,)} if plan.use_dora else {}
        for leaf, shape in names.items():
            key = f"{target.mlx_path}.{leaf}"
            held = tuple(tensors[key].shape) if key in tensors else None
            if held != shape:
                raise AdapterError(
                    f"{folder / WEIGHTS}: {key} {'is not there' if held is None else f'of shape {held}'}",
                    f"shape {shape}, which the base and {CONFIG} call for",
                    "the base it was trained on, with its own adapter_config.json",
                )
            value = tensors[key].astype(mx.float32)
            turned = leaf != "m" and target.kind != "experts"
            values[f"{target.mlx_path}.{_OURS[target.kind == 'embedding'][leaf]}"] = (
                mx.contiguous(value.T) if turned else value
            )
    if len(values) != len(tensors):
        known = {f"{t.mlx_path}.{leaf}" for t in targets for leaf in _LEAVES[: 3 if plan.use_dora else 2]}
        left = sorted(set(tensors) - known)
        raise AdapterError(
            f"{folder / WEIGHTS}: {len(tensors)} tensors{f', {left[0]} among them' if left else ''}",
            f"the {len(values)} that {CONFIG} and the base call for",
            "the base it was trained on, with its own adapter_config.json",
        )
    return values


_OURS = (
    {"lora_a": "lora_A", "lora_b": "lora_B", "m": "lora_magnitude_vector"},
    {"lora_a": "lora_embedding_A", "lora_b": "lora_embedding_B"},
)
