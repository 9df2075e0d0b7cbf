"""Folders as bitsandbytes 0.50 writes them, without the library, and the same weights dequantised.

The format: ``functional.QuantState.as_dict``; the numbers: the nearest entry of the 16 of ``get_4bit_type`` to each
weight over its block's largest, two to a byte, the first in the upper half.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022833424,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
FP4 = [sign * x / 12 for sign in (1, -1) for x in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)]
TABLES = {"nf4": np.array(NF4, np.float32), "fp4": np.array(FP4, np.float32)}


def write_pair(base: Path, coded: Path, dense: Path, *, kind="nf4", double=True, dtype="bfloat16", block=64) -> int:
    """``base`` twice: packed, and in fp32 with the packed weights' values.

    Returns:
        How many weights were packed.
    """
    packed, plain, count = {}, {}, 0
    for name, value in load_file(base / "model.safetensors").items():
        if not name.endswith("proj.weight"):
            packed[name] = plain[name] = value
            continue
        parts, plain[name] = quantise(name, value, kind, double, dtype, block)
        packed |= parts
        count += 1
    for folder, tensors in ((coded, packed), (dense, plain)):
        shutil.copytree(base, folder)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((coded / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitsandbytes", "_load_in_4bit": True, "_load_in_8bit": False, "load_in_4bit": True,
        "load_in_8bit": False, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double,
        "bnb_4bit_compute_dtype": "float32", "bnb_4bit_quant_storage": "uint8", "llm_int8_threshold": 6.0,
    }  # fmt: skip
    (coded / "config.json").write_text(json.dumps(config))
    return count


def quantise(name: str, weight: np.ndarray, kind: str, double: bool, dtype: str, block: int):
    """The stored tensors of one weight, and its values, fp32."""
    flat = weight.astype(np.float32).reshape(-1)
    blocks = np.pad(flat, (0, -flat.size % block)).reshape(-1, block)
    scales = np.abs(blocks).max(1)
    table = TABLES[kind]
    codes = np.abs(blocks[..., None] / np.maximum(scales, 1e-30)[:, None, None] - table).argmin(-1).astype(np.uint8)
    state = {"quant_type": kind, "blocksize": block, "dtype": dtype, "shape": list(weight.shape)}
    parts = {f"{name}.quant_map": table, f"{name}.absmax": scales}
    if double:
        offset, outer_map = float(scales.mean()), np.linspace(-1, 1, 256, dtype=np.float32)
        rest = np.pad(scales - np.float32(offset), (0, -scales.size % 256)).reshape(-1, 256)
        outer = np.abs(rest).max(1)
        bytes_ = np.abs(rest[..., None] / outer[:, None, None] - outer_map).argmin(-1).astype(np.uint8)
        scales = (outer_map[bytes_] * outer[:, None]).reshape(-1)[: scales.size] + np.float32(offset)
        parts[f"{name}.absmax"] = bytes_.reshape(-1)[: scales.size]
        parts |= {f"{name}.nested_absmax": outer, f"{name}.nested_quant_map": outer_map}
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
    values = (table[codes] * scales[:, None]).reshape(-1)[: flat.size]
    values = torch.from_numpy(values).to(getattr(torch, dtype)).float().numpy()
    flat_codes = codes.reshape(-1)[: flat.size + flat.size % 2]
    parts[name] = ((flat_codes[::2] << 4) | flat_codes[1::2])[:, None]
    record = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return parts | {f"{name}.quant_state.bitsandbytes__{kind}": record}, values.reshape(weight.shape)
