"""Fold an adapter into its base: in memory, or as a Hugging Face model folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from ..atomic import staged
from ..errors import AdapterError
from ..intake import LARGE
from ..models.blockwise import BlockLinear, dequantize, quantize
from ..models.config import FILES
from ..models.save import write_model
from .adapter import Adapter
from .files import check_vacant
from .layers import LoRALinear, dense_weight

# Below this share of a delta surviving re-quantisation, merging would visibly undo the training.
SURVIVAL = 0.9
_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja")


def merge_adapter(adapter: Adapter, folder: str | Path, *, dequantize: bool = False) -> Path:
    """Write base plus adapter as a folder that ``AutoModelForCausalLM.from_pretrained`` loads.

    Args:
        adapter: Stays attached; the model in memory does not change.
        folder: Where to write: a folder that does not exist yet or is empty. It appears whole or not at all.
        dequantize: Agree that a quantised base is written in floating point.

    Returns:
        The folder.

    Raises:
        AdapterError: The base is quantised and ``dequantize`` was not given, the adapter cannot be merged, a merged
            value is not finite, or ``folder`` holds something.
    """
    folder = Path(folder).expanduser()
    if folder.exists() and folder.resolve() == adapter.loaded.path.expanduser().resolve():
        raise AdapterError(
            f"folder {folder}, the base itself", "another folder", f'merge_adapter(..., "{folder}-merged")'
        )
    check_vacant(folder)
    kept = measure_survival(adapter)
    if _is_quantized(adapter.loaded.model) and not dequantize:
        worst = f"; quantised again, {min(kept.values()):.0%} of the adapter would survive" if kept else ""
        raise AdapterError(
            f"a quantised base{worst}",
            "a base in floating point, as Hugging Face stores it",
            f"hf-mlx merge ADAPTER {folder} --dequantize, or merge into the original with --base OWNER/MODEL",
        )
    params = merged_parameters(adapter)
    check_merged(adapter, params)
    with staged(folder, AdapterError) as temporary:
        write_model(adapter.loaded, temporary, params)
        source = _tokenizer_folder(adapter)
        for pattern in _TOKENIZER_FILES:
            for file in source.glob(pattern):
                FILES.check(file, LARGE)
                shutil.copyfile(file, temporary / file.name)
    return folder


def check_merged(adapter: Adapter, params: Mapping[str, mx.array]) -> None:
    """Evaluate merged parameters, each in the dtype it is written in, and refuse NaN and infinite values.

    Raises:
        AdapterError: With the tensor's name, and whether the base or the adapter is to blame.
    """
    adapted = {f"{path}.weight" for target in adapter.targets for path in target.paths}
    for path, value in params.items():
        if not mx.issubdtype(value.dtype, mx.floating) or mx.isfinite(value).all().item():
            continue
        name = adapter.loaded.names.to_hf_names(path)[0]
        dtype = str(value.dtype).rsplit(".", 1)[-1]
        raise AdapterError(
            f"{name}: NaN or infinite values in {dtype} "
            + ("once the adapter is folded in" if path in adapted else "in the base or among the trained weights"),
            "finite weights",
            "an adapter and a base whose own logits are finite (hf-mlx verify ADAPTER); a base in float16 may "
            "overflow where bfloat16 or float32 do not",
        )


def _tokenizer_folder(adapter: Adapter) -> Path:
    """The tokenizer that was saved with the adapter, which knows added tokens, else the base's."""
    own = adapter.folder
    if own is not None and (own / "tokenizer_config.json").is_file():
        return own
    return adapter.loaded.path


def merged_parameters(adapter: Adapter) -> dict[str, mx.array]:
    """Every parameter of the merged model by flat MLX path, in floating point.

    Raises:
        AdapterError: ``lora_bias`` was trained on a layer that has no bias to add it to.
    """
    model = adapter.loaded.model
    layers = _layers(adapter)
    params: dict[str, mx.array] = {}
    for path, module in model.named_modules():
        if path in layers:
            layer = layers[path]
            params |= {f"{path}.{name}": v for name, v in layer.base_layer.items() if isinstance(v, mx.array)}
            params[f"{path}.weight"] = layer.merged_weight()
            if isinstance(layer, LoRALinear) and "lora_B_bias" in layer:
                params[f"{path}.bias"] = _merged_bias(path, layer)
        elif not path.endswith(".base_layer") or path.removesuffix(".base_layer") not in layers:
            # MLX keeps what begins with an underscore out of parameters(): tables of rotary frequencies.
            own = {name: v for name, v in module.items() if isinstance(v, mx.array) and not name.startswith("_")}
            if "scales" in module:
                own["weight"] = dense_weight(module)
            params |= {f"{path}.{name}" if path else name: v for name, v in own.items()}
    quantized = [path for path, module in model.named_modules() if "scales" in module]
    for path in quantized:
        plain = path.removesuffix(".base_layer")
        params.pop(f"{plain}.scales", None)
        params.pop(f"{plain}.biases", None)
    return params


def merge_and_unload(adapter: Adapter, *, threshold: float = SURVIVAL) -> nn.Module:
    """Replace every LoRA layer by its merged base layer, in place.

    A quantised layer is quantised again where at least ``threshold`` of its delta survives that, and kept in
    floating point where not.

    Args:
        adapter: No longer usable afterwards.
        threshold: Share of the delta, 0 to 1, by :func:`measure_survival`.

    Returns:
        The model, without adapter.
    """
    if adapter.split is not None:
        raise AdapterError(
            f"merge_and_unload() of a model that {adapter.split.world.size} processes hold together",
            "a model that one process holds",
            "trainer.save_model(dir), and then hf-mlx merge dir MERGED on one machine, an array at a time",
        )
    kept = measure_survival(adapter)
    check_merged(adapter, {f"{path}.weight": layer.merged_weight() for path, layer in _layers(adapter).items()})
    replaced = {}
    for path, layer in _layers(adapter).items():
        base, weight = layer.base_layer, layer.merged_weight()
        if isinstance(layer, LoRALinear) and "lora_B_bias" in layer:
            base.bias = _merged_bias(path, layer)
        if "scales" not in base:
            base.weight = weight
            replaced[path] = base
        else:
            replaced[path] = _requantized(base, weight) if kept[path] >= threshold else _in_floating_point(base, weight)
    adapter.loaded.model.update_modules(tree_unflatten(list(replaced.items())))
    mx.eval(adapter.loaded.model.parameters())
    return adapter.loaded.model


def measure_survival(adapter: Adapter) -> dict[str, float]:
    """How much of each delta would survive quantising the merged weight like its base.

    Returns:
        MLX path of each quantised target → 1 − ‖Q(W+Δ) − (W+Δ)‖ / ‖Δ‖, at least 0; 1 for a delta of zero.
    """
    return {path: _survival(layer) for path, layer in _layers(adapter).items() if "scales" in layer.base_layer}


def _survival(layer: Any) -> float:
    base, merged = layer.base_layer, layer.merged_weight().astype(mx.float32)
    delta = _norm(merged - dense_weight(base).astype(mx.float32))
    if delta == 0:
        return 1.0
    error = _norm(_round_trip(base, merged) - merged)
    return max(0.0, 1.0 - error / delta)


def _norm(x: mx.array) -> float:
    return float(mx.linalg.norm(x.reshape(-1)).item())  # pyright: ignore[reportArgumentType]


def _quantize(base: Any, weight: mx.array) -> list[mx.array]:
    if isinstance(base, BlockLinear):
        return list(quantize(weight, base.mode, base.group_size))
    # The base's own dtype decides in which precision scales are kept.
    return list(mx.quantize(weight.astype(base.scales.dtype), base.group_size, base.bits, mode=base.mode))


def _round_trip(base: Any, weight: mx.array) -> mx.array:
    packed = _quantize(base, weight)
    if isinstance(base, BlockLinear):
        codes, scales = (part.reshape(-1) for part in packed)
        flat = dequantize(codes.view(mx.uint8), scales, base.mode, base.group_size, base.dtype)
        return flat.reshape(weight.shape).astype(mx.float32)
    return mx.dequantize(*packed, group_size=base.group_size, bits=base.bits, mode=base.mode).astype(mx.float32)


def _requantized(base: Any, weight: mx.array) -> nn.Module:
    packed = _quantize(base, weight)
    base.weight, base.scales = packed[:2]
    if len(packed) > 2:
        base.biases = packed[2]
    return base


def _in_floating_point(base: Any, weight: mx.array) -> nn.Module:
    from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    bias = base.get("bias")
    if isinstance(base, QuantizedSwitchLinear):
        plain = SwitchLinear(base.input_dims, base.output_dims, base.num_experts, bias=bias is not None)
    elif isinstance(base, QuantizedMultiLinear):
        heads, outputs, inputs = weight.shape
        plain = MultiLinear(inputs, outputs, heads)
    elif isinstance(base, nn.QuantizedEmbedding):
        plain = nn.Embedding(*weight.shape)
    else:
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    plain.weight = weight
    if bias is not None:
        plain.bias = bias
    plain.freeze()
    return plain


def _merged_bias(path: str, layer: LoRALinear) -> mx.array:
    if "bias" not in layer.base_layer:
        raise AdapterError(
            f"lora_bias=True on {path}, whose base has no bias",
            "a base bias to add it to",
            "keep the adapter beside the base, or train with LoraConfig(lora_bias=False)",
        )
    bias: mx.array = layer.base_layer["bias"]
    return (bias + layer.lora_B_bias * layer.scale).astype(bias.dtype)


def _layers(adapter: Adapter) -> dict:
    modules = dict(adapter.loaded.model.named_modules())
    rows = [chosen.site.mlx_path for chosen in adapter.blueprint.rows]
    return {path: modules[path] for path in [*(p for target in adapter.targets for p in target.paths), *rows]}


def _is_quantized(model: nn.Module) -> bool:
    return any("scales" in module for module in model.modules())
