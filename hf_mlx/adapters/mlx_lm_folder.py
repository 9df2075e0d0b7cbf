"""mlx-lm's own adapter folders, out: what ``mlx_lm.generate --adapter-path`` loads.

Source of the format: ``mlx_lm.tuner.utils.linear_to_lora_layers`` and ``load_adapters`` (mlx-lm 0.32). One rank, one
scale and one dropout hold for all modules; ``keys`` name modules below a decoder layer, or in full.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import AdapterError
from .adapter import Adapter
from .files import write_files, write_text
from .mlx_lm_check import check_in_mlx_lm
from .origin import resolve_origin
from .parts import LoRALatent, LoRARouter, Rows
from .source import CONFIG, check_finite
from .targets import Target

WEIGHTS = "adapters.safetensors"


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
        for path, a, b in _pairs(target, modules):
            if target.scale != scale:
                b = b * (target.scale / scale)
            a, b = _filled(a, -2, rank), _filled(b, -1, rank)
            # mlx-lm keeps an expert's matrices as they are multiplied, and all others transposed.
            if target.kind != "experts":
                a, b = mx.contiguous(a.T), mx.contiguous(b.T)
            tensors |= {f"{path}.lora_a": a, f"{path}.lora_b": b}
            if "lora_magnitude_vector" in modules[path]:
                tensors[f"{path}.m"] = modules[path].lora_magnitude_vector
    return tensors


def _pairs(target: Target, modules: Mapping[str, Any]) -> Iterator[tuple[str, mx.array, mx.array]]:
    """(MLX path, A, B) of each layer that a target is made of."""
    layer = modules[target.mlx_path]
    if isinstance(layer, (LoRARouter, LoRALatent)):
        raise AdapterError(
            f"an adapter that trained {target.hf_path}, a {type(layer.base_layer).__name__} in mlx-lm",
            "layers that mlx-lm's tuner adapts: Linear, Embedding and experts",
            "a merged model, which mlx-lm loads as it is: hf-mlx merge ADAPTER FOLDER",
        )
    if target.kind == "embedding":
        yield target.mlx_path, layer.lora_embedding_A, layer.lora_embedding_B
    for path in target.paths if target.kind != "embedding" else ():
        rows = getattr(modules[path], "_rows", Rows())
        if target.kind == "experts":
            yield path, *layer.factors(rows)
        else:
            yield path, layer.lora_A, rows(layer.lora_B)


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
    chosen = {path for target in adapter.targets for path in target.paths}
    inside_layers = {path: layer for path in chosen for layer in layers if path.startswith(f"{layer}.")}
    names = {path.removeprefix(f"{layer}.") for path, layer in inside_layers.items()}
    first = min((layers.index(layer) for layer in inside_layers.values()), default=0)
    selected = {f"{layer}.{name}" for layer in layers[first:] for name in names} & set(modules)
    if names and selected == set(inside_layers):
        return sorted(names | (chosen - selected)), len(layers) - first
    return sorted(chosen), len(layers)
