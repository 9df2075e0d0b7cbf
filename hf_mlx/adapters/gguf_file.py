"""An adapter as one GGUF file: what llama.cpp's ``--lora`` and Ollama's ``ADAPTER`` take.

Source of the format: llama.cpp's ``convert_lora_to_gguf.py`` and ``llama_adapter_lora_init`` (build 11434): one alpha
for the file, a rank for each tensor, ``scale = alpha / rank``. Names come from the gguf package's own tables.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import AdapterError, MissingDependency
from .adapter import Adapter
from .files import write_files
from .origin import resolve_origin
from .source import check_finite
from .targets import Target

# HF model type → the gguf package's MODEL_ARCH, for those whose files were compared with llama.cpp's own converter.
ARCHITECTURES: Mapping[str, str] = {
    "gemma": "GEMMA",
    "gemma2": "GEMMA2",
    "gemma3_text": "GEMMA3",
    "granite": "GRANITE",
    "llama": "LLAMA",
    "mistral": "LLAMA",
    "olmo2": "OLMO2",
    "phi3": "PHI3",
    "qwen2": "QWEN2",
    "qwen3": "QWEN3",
    "smollm3": "SMOLLM3",
}
# llama.cpp rotates neighbouring dimensions there, so rows of queries and keys change their order.
INTERLEAVED = ("granite", "llama", "mistral", "smollm3")


def write_gguf(adapter: Adapter, path: str | Path, *, base: str | None = None) -> Path:
    """Write an adapter as a GGUF file in fp32, read it back and compare.

    A module's own scale, where it is not the file's, goes into its second matrix.

    Args:
        adapter: What to write; it stays as it is.
        path: The file, ``*.gguf``.
        base: Name of the base to record; found out where not given.

    Returns:
        The path.

    Raises:
        AdapterError: A model type whose tensors are not known here, or an adapter that llama.cpp cannot apply.
        MissingDependency: The gguf package is not installed.
    """
    path = Path(path)
    _check(adapter, path)
    if importlib.util.find_spec("gguf") is None:
        raise MissingDependency("--format gguf without the gguf package", "gguf", 'pip install "hf-mlx[gguf]"')
    # A scale of zero would be read as "no alpha": alpha / rank = 1.
    first = adapter.targets[0]
    alpha = first.scale * first.r or 1.0
    tensors = _tensors(adapter, alpha)
    name = base or resolve_origin(adapter.loaded)[0]
    write_files(path.parent, {path.name: lambda file: _write(file, adapter.loaded.model_type, tensors, alpha, name)})
    _read_back(path, tensors)
    return path


def _check(adapter: Adapter, path: Path) -> None:
    merged = f"a merged model, which llama.cpp's convert_hf_to_gguf.py takes: hf-mlx merge ADAPTER {path.stem}"
    if path.suffix != ".gguf" or path.is_dir():
        raise AdapterError(f"output {path}", "a file that ends in .gguf", f"hf-mlx export ADAPTER {path}.gguf ...")
    if adapter.loaded.model_type not in ARCHITECTURES:
        raise AdapterError(
            f"model type {adapter.loaded.model_type!r} with --format gguf", f"one of {', '.join(ARCHITECTURES)}", merged
        )
    blueprint, plan = adapter.blueprint, adapter.plan
    wrong = {
        "use_dora=True": plan.use_dora,
        "lora_bias=True": plan.lora_bias,
        "modules_to_save": bool(blueprint.saved),
        f"bias={plan.bias!r}": bool(blueprint.biased),
        "an adapted embedding": any(target.kind != "linear" for target in adapter.targets),
    }
    for what, found in wrong.items():
        if found:
            raise AdapterError(
                f"an adapter with {what} and --format gguf",
                "LoRA on linear layers: llama.cpp adds nothing else",
                merged,
            )


def _tensors(adapter: Adapter, alpha: float) -> dict[str, np.ndarray]:
    import gguf

    config = adapter.loaded.config
    arch = getattr(gguf.MODEL_ARCH, ARCHITECTURES[adapter.loaded.model_type])
    names = gguf.get_tensor_name_map(arch, int(config["num_hidden_layers"]))
    modules: dict[str, Any] = dict(adapter.loaded.model.named_modules())
    matrices = {}
    for target in adapter.targets:
        layer = modules[target.mlx_path]
        matrices |= {f"{target.hf_path}.a": layer.lora_A, f"{target.hf_path}.b": layer.lora_B}
    check_finite(matrices, "the adapter")
    tensors: dict[str, np.ndarray] = {}
    for target in adapter.targets:
        name = names.get_name(f"{target.hf_path}.weight", try_suffixes=(".weight",))
        if name is None:
            raise AdapterError(
                f"{target.hf_path} with --format gguf",
                "modules that llama.cpp has",
                f'LoraConfig(..., exclude_modules=["{target.hf_path.rsplit(".", 1)[-1]}"])',
            )
        a, b = (np.array(matrices[f"{target.hf_path}.{leaf}"].astype(mx.float32)) for leaf in "ab")
        tensors |= {f"{name}.lora_a": a, f"{name}.lora_b": _second(adapter, target, b, alpha)}
    return tensors


def _second(adapter: Adapter, target: Target, b: np.ndarray, alpha: float) -> np.ndarray:
    factor = target.scale * target.r / alpha
    b = b if factor == 1 else (b * np.float32(factor)).astype(np.float32)
    leaf = target.hf_path.rsplit(".", 1)[-1]
    if adapter.loaded.model_type not in INTERLEAVED or leaf not in ("q_proj", "k_proj"):
        return np.ascontiguousarray(b)
    config = adapter.loaded.config
    heads = int(config["num_attention_heads"])
    return interleave(b, heads if leaf == "q_proj" else int(config.get("num_key_value_heads") or heads))


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys (heads · head_dim, ...) in llama.cpp's order: halves of a head become neighbours."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))


def _write(path: Path, model_type: str, tensors: Mapping[str, np.ndarray], alpha: float, base: str) -> None:
    import gguf

    arch = getattr(gguf.MODEL_ARCH, ARCHITECTURES[model_type])
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_string("general.name", f"LoRA for {base}")
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _read_back(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    from gguf import GGUFReader

    held = {tensor.name: tensor.data for tensor in GGUFReader(path).tensors}
    if set(held) != set(tensors) or any(not np.array_equal(held[name], tensors[name]) for name in tensors):
        raise AdapterError(
            f"{path}, whose tensors read back otherwise", "the same numbers", "a disk that keeps what is written"
        )
