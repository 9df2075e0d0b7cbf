"""Checkpoints that bitsandbytes quantised to four bits, read as CUDA reads them.

Beside a packed ``weight`` stand its scales (``absmax``, themselves of 8 bits where quantised twice) and a record in
JSON. Source: bitsandbytes 0.50 ``functional.QuantState.as_dict`` and ``from_dict``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from ..errors import ModelError
from .blockwise import TABLES, BlockLinear, dequantize
from .config import FILES
from .weights import Checkpoint, Tensor

_RECORD = ".quant_state.bitsandbytes__"
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Packed:
    """One quantised weight.

    Attributes:
        codes: (bytes,) uint8.
        scales: (blocks,) fp32.
        shape, dtype: Of the weight, as the checkpoint records them.
        kind: ``"nf4"`` or ``"fp4"``.
        block: Numbers to a scale.
        dense: The weight itself, not computed before something needs it.
    """

    codes: mx.array
    scales: mx.array
    shape: tuple[int, ...]
    dtype: mx.Dtype
    kind: str
    block: int
    dense: mx.array


def is_four_bit(config: Mapping[str, Any]) -> bool:
    """Whether ``config.json`` says that bitsandbytes packed the weights into four bits."""
    quantizer = config.get("quantization_config")
    if not isinstance(quantizer, dict) or config.get("quantization"):
        return False
    method = quantizer.get("quant_method", "bitsandbytes")
    return "bitsandbytes" in str(method) and quantizer.get("load_in_4bit") is True


def unpack(folder: Path, stored: Checkpoint) -> tuple[Checkpoint, dict[str, mx.array], dict[str, Packed]]:
    """A checkpoint as if it had not been quantised, without computing a weight.

    Returns:
        Its tensors, their (lazy) values, and what is packed by the weight's name.

    Raises:
        ModelError: No record, one that cannot be read, or parts that do not fit it.
    """
    arrays: dict[str, mx.array] = {}
    for file in stored.files:
        loaded: Any = mx.load(str(folder / file))
        arrays |= loaded
    tensors = dict(stored.tensors)
    packed: dict[str, Packed] = {}
    records = [key for key in stored.tensors if _RECORD in key]
    if not records:
        raise ModelError(
            f"{folder}: a quantization_config of bitsandbytes, and no packed weight in the files",
            "a config.json that was saved with these weights",
            "take quantization_config out of config.json and pass it to the trainer: "
            "quantization_config=BitsAndBytesConfig(load_in_4bit=True)",
        )
    for key in records:
        name, _, kind = key.partition(_RECORD)
        with FILES.understood(folder / stored.tensors[key].file, "weights as bitsandbytes packs them into 4 bits"):
            packed[name] = _read(name, kind, arrays, arrays.pop(key))
        del tensors[key]
        for part in _PARTS:
            tensors.pop(f"{name}.{part}", None)
            arrays.pop(f"{name}.{part}", None)
        arrays[name] = packed[name].dense
        dtype = _DTYPES[str(packed[name].dtype).removeprefix("mlx.core.")]
        tensors[name] = Tensor(dtype, packed[name].shape, stored.tensors[name].file)
    return Checkpoint(stored.files, tensors, stored.layout), arrays, packed


def hold_packed(model: nn.Module, found: Mapping[str, Packed], compute_dtype: str) -> int:
    """Put layers that hold the codes in place of the Linear layers at these paths.

    Args:
        model: Changed in place.
        found: What :func:`find_packed` gave.
        compute_dtype: ``bnb_4bit_compute_dtype``.

    Returns:
        How many.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    layers = {
        path: BlockLinear(
            one.codes,
            one.scales,
            one.shape,
            one.kind,
            one.dtype,
            getattr(mx, compute_dtype),
            modules[path].get("bias"),
        )
        for path, one in found.items()
    }
    model.update_modules(tree_unflatten(list(layers.items())))
    return len(layers)


def find_packed(model: nn.Module, packed: Mapping[str, Packed]) -> dict[str, Packed]:
    """Path → packed weight of the Linear layers that are one on both sides, and whose rows are whole blocks.

    What was stacked, split or turned on loading is none of them, and is held in floating point.
    """
    owners = {id(one.dense): one for one in packed.values() if len(one.shape) == 2 and one.shape[1] % one.block == 0}
    found = {}
    for path, module in model.named_modules():
        one = owners.get(id(module["weight"])) if type(module) is nn.Linear else None
        if one is not None:
            found[path] = one
    return found


def compute_dtype(config: Mapping[str, Any]) -> str:
    """What products with these weights run in: transformers' ``bnb_4bit_compute_dtype``, float32 by default."""
    named = str(config["quantization_config"].get("bnb_4bit_compute_dtype") or "float32").removeprefix("torch.")
    if named not in _DTYPES:
        raise ValueError(f"bnb_4bit_compute_dtype={named!r}")
    return named


def describe_packed(held: int, packed: int) -> str:
    """What is said once of a base that bitsandbytes quantised."""
    line = "the base keeps bitsandbytes' own 4-bit values, exactly: "
    line += f"{held} layer(s) as codes, computed anew for each product"
    if packed > held:
        line += f"; {packed - held} weight(s) that MLX holds in another form are in floating point"
    return f"{line}. The adapter stays in fp32, where trl casts it to bf16 over a quantised base"


def _read(name: str, kind: str, arrays: Mapping[str, mx.array], record: mx.array) -> Packed:
    state = json.loads(np.array(record).tobytes())
    shape, block, dtype = tuple(state["shape"]), state["blocksize"], state["dtype"]
    count = math.prod(shape)
    codes, stored = arrays[name].reshape(-1), arrays[f"{name}.quant_map"]
    blocks = -(-count // block)
    scales = _scales(name, arrays, state).reshape(-1)
    sound = kind in TABLES and dtype in _DTYPES and block > 0 and count > 0 and all(type(n) is int for n in shape)
    if not sound or codes.dtype != mx.uint8 or codes.size != -(-count // 2) or scales.size != blocks:
        raise ValueError(f"{name} of shape {shape}, {codes.size} bytes of codes and {scales.size} scales")
    if not np.allclose(np.array(stored), TABLES[kind], atol=1e-6):
        raise ValueError(f"{name}.quant_map is not {kind}'s")
    target = getattr(mx, dtype)
    dense = dequantize(codes, scales, kind, block, target)[:count].reshape(shape)
    return Packed(codes, scales, shape, target, kind, block, dense)


def _scales(name: str, arrays: Mapping[str, mx.array], state: Mapping[str, Any]) -> mx.array:
    absmax = arrays[f"{name}.absmax"]
    if "nested_blocksize" not in state:
        return absmax.astype(mx.float32)
    block, outer = state["nested_blocksize"], arrays[f"{name}.nested_absmax"].astype(mx.float32)
    values = arrays[f"{name}.nested_quant_map"].astype(mx.float32)[absmax]
    return values * mx.repeat(outer, block)[: values.size] + state["nested_offset"]
