"""A whole model as one GGUF file, for llama.cpp, Ollama and LM Studio.

Source of the format: llama.cpp's ``convert_hf_to_gguf.py`` (build 11434): names from the gguf package's own tables,
matrices in the model's dtype, vectors in fp32, rows of queries and keys as llama.cpp rotates them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import MissingDependency, ModelError
from ..models.config import interpret, read_config
from .files import write_files
from .gguf_file import ARCHITECTURES, INTERLEAVED, interleave
from .gguf_vocabulary import add_vocabulary, read_vocabulary

#: Types whose files were read back by transformers' own reader and computed the same logits.
TYPES = ("llama", "mistral", "qwen2", "qwen3")
_DTYPES = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16"}
_ROPES = ("default", "linear", "llama3")


def is_model_folder(folder: str | Path) -> bool:
    """Whether a folder holds a whole model and no adapter."""
    return (Path(folder) / "config.json").is_file() and not (Path(folder) / "adapter_config.json").is_file()


def write_gguf_model(folder: str | Path, path: str | Path, *, name: str | None = None) -> Path:
    """Write a Hugging Face model folder as a GGUF file, read it back and compare.

    Args:
        folder: With config.json, safetensors in floating point, and a tokenizer.
        path: The file, ``*.gguf``.
        name: Of the model, for people; the folder's name where not given.

    Returns:
        The path.

    Raises:
        ModelError: A model type, a tokenizer, rotary embeddings or a tensor that are not known here.
        MissingDependency: The gguf package is not installed.
    """
    folder, path = Path(folder), Path(path)
    config = interpret(read_config(folder))
    _check(config, path)
    if importlib.util.find_spec("gguf") is None:
        raise MissingDependency("a GGUF file without the gguf package", "gguf", 'pip install "hf-mlx[gguf]"')
    vocabulary = read_vocabulary(folder, int(config["vocab_size"]))
    tensors = dict(_tensors(folder, config))
    title = name or folder.resolve().name
    write_files(path.parent, {path.name: lambda file: _write(file, config, tensors, vocabulary, title)})
    _read_back(path, tensors)
    return path


def _check(config: Mapping[str, Any], path: Path) -> None:
    converter = "llama.cpp's own converter: python convert_hf_to_gguf.py MODEL --outfile model.gguf"
    if path.suffix != ".gguf" or path.is_dir():
        raise ModelError(f"output {path}", "a file that ends in .gguf", f"hf-mlx merge ADAPTER {path}.gguf")
    if config["model_type"] not in TYPES:
        raise ModelError(f"model type {config['model_type']!r} as a GGUF file", f"one of {', '.join(TYPES)}", converter)
    if config.get("quantization") or config.get("quantization_config"):
        raise ModelError(
            "quantised weights as a GGUF file", "weights in floating point", "hf-mlx merge ADAPTER FOLDER --dequantize"
        )
    kind = _rope(config).get("rope_type", "default")
    if kind not in _ROPES:
        raise ModelError(f"rotary embeddings of type {kind!r} as a GGUF file", f"one of {', '.join(_ROPES)}", converter)
    for key in ("sliding_window",):
        window = config.get(key) if config.get("use_sliding_window", True) else None
        if window and window < config["max_position_embeddings"]:
            raise ModelError(
                f"{key}={window} as a GGUF file",
                "attention to all earlier tokens: llama.cpp has no window for this type",
                converter,
            )


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config.get("rope_parameters") or {}


def _head_dim(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _tensors(folder: Path, config: Mapping[str, Any]) -> Iterator[tuple[str, mx.array]]:
    import gguf

    arch = getattr(gguf.MODEL_ARCH, ARCHITECTURES[config["model_type"]])
    names = gguf.get_tensor_name_map(arch, int(config["num_hidden_layers"]))
    heads = int(config["num_attention_heads"])
    groups = {"q_proj": heads, "k_proj": int(config.get("num_key_value_heads") or heads)}
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise ModelError(f"{folder}: no model*.safetensors", "a whole model", "hf-mlx merge ADAPTER FOLDER")
    for file in files:
        held: Any = mx.load(str(file))
        for key, value in held.items():
            if key == "lm_head.weight" and config.get("tie_word_embeddings"):
                continue
            name = names.get_name(key, try_suffixes=(".weight", ".bias"))
            if name is None or value.dtype not in _DTYPES:
                raise ModelError(
                    f"{key} ({value.dtype}) as a GGUF file",
                    "tensors that llama.cpp has, in floating point",
                    "llama.cpp's own converter: python convert_hf_to_gguf.py MODEL --outfile model.gguf",
                )
            leaf = key.split(".")[-2]
            if config["model_type"] in INTERLEAVED and leaf in groups:
                # As bits: numpy has no bf16.
                bits = np.array(value.view(mx.uint16 if value.itemsize == 2 else mx.uint32))
                turned = mx.array(interleave(bits, groups[leaf])).view(value.dtype)
                value = turned.reshape(value.shape)
            yield name, value.astype(mx.float32) if value.ndim == 1 else value
    if _rope(config).get("rope_type") == "llama3":
        yield "rope_freqs.weight", mx.array(_rope_factors(config))


def _rope_factors(config: Mapping[str, Any]) -> np.ndarray:
    """What llama.cpp divides each frequency by (transformers 5.23 ``_compute_llama3_parameters``)."""
    rope, width = _rope(config), _head_dim(config)
    frequencies = float(rope["rope_theta"]) ** -(np.arange(0, width, 2, dtype=np.float64) / width)
    waves = 2 * np.pi / frequencies
    factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    context = float(rope["original_max_position_embeddings"])
    smooth = np.clip((context / waves - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def _write(path: Path, config: Mapping[str, Any], tensors: Mapping[str, mx.array], vocabulary: Any, title: str) -> None:
    import gguf

    arch = gguf.MODEL_ARCH_NAMES[getattr(gguf.MODEL_ARCH, ARCHITECTURES[config["model_type"]])]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(title)
    heads, width = int(config["num_attention_heads"]), _head_dim(config)
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config.get("num_key_value_heads") or heads))
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_rope_freq_base(float(_rope(config).get("rope_theta", 10_000.0)))
    writer.add_rope_dimension_count(width)
    if _rope(config).get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(_rope(config)["factor"]))
    writer.add_vocab_size(int(config["vocab_size"]))
    kinds = {value.dtype for value in tensors.values() if value.ndim > 1}
    stored = {mx.float32: "ALL_F32", mx.float16: "MOSTLY_F16", mx.bfloat16: "MOSTLY_BF16"}
    writer.add_file_type(getattr(gguf.LlamaFileType, stored[kinds.pop()] if len(kinds) == 1 else "GUESSED"))
    add_vocabulary(writer, vocabulary)
    for name, value in tensors.items():
        writer.add_tensor(name, _bytes(value), raw_dtype=_kind(value), raw_shape=None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _kind(value: mx.array) -> Any:
    import gguf

    return getattr(gguf.GGMLQuantizationType, _DTYPES[value.dtype])


def _bytes(value: mx.array) -> np.ndarray:
    """As the gguf package holds it: numpy's own dtype, or the bytes of bf16."""
    if value.dtype != mx.bfloat16:
        return np.array(value)
    return np.array(value.view(mx.uint16)).view(np.uint8)


def _read_back(path: Path, tensors: Mapping[str, mx.array]) -> None:
    from gguf import GGUFReader

    held = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    for name, value in tensors.items():
        found = held.pop(name, None)
        if found is None or found.tensor_type != _kind(value) or not np.array_equal(found.data, _bytes(value)):
            raise ModelError(
                f"{path}: {name} reads back otherwise", "the same bits", "a disk that keeps what is written"
            )
    if held:
        raise ModelError(f"{path}: {sorted(held)[0]} besides", "the tensors that were written", "please report it")
