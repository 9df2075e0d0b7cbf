"""What fits a Mac of 16, 32 or 64 GB, by the estimate that a run is planned with; no weight is read.

    python benchmarks/memory_table.py --write docs/memory.md

A model is a config and a file of zeros that takes no room on disk, of one and of two blocks: each part of the estimate
(``hf_mlx.training.memory.estimate``, within 1.5 of what MLX measures, docs/performance.md) is linear in the blocks.
"""

from __future__ import annotations

import argparse
import json
import re
import struct
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import transformers
from mlx.utils import tree_flatten
from transformers import AutoConfig

from hf_mlx.adapters.attach import attach
from hf_mlx.models.heads import split_head
from hf_mlx.models.load import load_model
from hf_mlx.models.precision import apply_autocast, store_frozen_weights
from hf_mlx.settings.resolve import resolve_plan
from hf_mlx.training.memory import ACCURACY, MemoryEstimate, estimate
from hf_mlx.training.optim import make_optimizer

# Sizes of published models; weights in bf16.
LLAMA = {"vocab_size": 128_256, "num_key_value_heads": 8, "rms_norm_eps": 1e-5}
QWEN = {"vocab_size": 151_936, "tie_word_embeddings": True}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "SmolLM2-135M": (
        "llama",
        {"vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
         "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
    ),
    "Qwen2.5-1.5B": (
        "qwen2",
        {**QWEN, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
         "num_key_value_heads": 2},
    ),
    "Llama-3.2-3B": (
        "llama",
        {**LLAMA, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
         "tie_word_embeddings": True},
    ),
    "Qwen2.5-7B": (
        "qwen2",
        {"vocab_size": 152_064, "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28,
         "num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False},
    ),
}  # fmt: skip
WAYS = ("LoRA, 4-bit base", "LoRA", "all weights")
LENGTHS = (1024, 4096)
# GB in the Mac → GiB that macOS recommends a GPU's working set to be: two thirds, from 64 GB on three quarters.
MACS = {16: 16 * 2 / 3, 32: 32 * 2 / 3, 64: 64 * 3 / 4}
# As mlx-lm quantises: groups of 64, a scale and a bias each.
BITS, GROUP = 4, 64
MARKS = ("<!-- memory_table: begin -->", "<!-- memory_table: end -->")


def make_folder(folder: Path, model_type: str, sizes: dict[str, Any], *, quantised: bool) -> Path:
    """A model folder whose weights are a hole in a file."""
    config = AutoConfig.for_model(model_type, dtype="bfloat16", **sizes)
    config.architectures = ["LlamaForCausalLM" if model_type == "llama" else "Qwen2ForCausalLM"]
    written = {**config.to_dict(), **({"quantization": {"bits": BITS, "group_size": GROUP}} if quantised else {})}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(written))
    header, offset = {}, 0
    for name, kind, shape in tensors(config, quantised=quantised):
        size = {"BF16": 2, "U32": 4}[kind]
        for side in shape:
            size *= side
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps({"__metadata__": {"format": "mlx" if quantised else "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    return folder


def tensors(config: Any, *, quantised: bool) -> Iterator[tuple[str, str, list[int]]]:
    """Name, dtype and shape of each, from the class of transformers on its own meta device."""
    import torch

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    for name, value in model.state_dict().items():
        shape = list(value.shape)
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if not quantised or len(shape) == 1:
            yield name, "BF16", shape
            continue
        plain = name.removesuffix(".weight")
        yield name, "U32", [shape[0], shape[1] * BITS // 32]
        yield f"{plain}.scales", "BF16", [shape[0], shape[1] // GROUP]
        yield f"{plain}.biases", "BF16", [shape[0], shape[1] // GROUP]


def measure(folder: Path, way: str, tokens: int) -> MemoryEstimate:
    """A step of one row, with checkpointing, bf16 and AdamW."""
    lora = {"r": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} if way != "all weights" else None
    args = {"gradient_checkpointing": True, "bf16": True, "per_device_train_batch_size": 1, "max_length": tokens}
    plan, _ = resolve_plan(args, lora)
    loaded = load_model(folder, plan.model)
    # In a session's order (hf_mlx.session): what is frozen is kept in bf16.
    apply_autocast(loaded.model, mx.bfloat16)
    if plan.lora is not None:
        params = attach(loaded, plan.lora, seed=0, compute_dtype=mx.bfloat16).trainable()
        store_frozen_weights(loaded.model, mx.bfloat16)
    else:
        params = dict(tree_flatten(loaded.model.parameters()))
    split = split_head(loaded)
    return estimate(
        loaded.model, params, make_optimizer(plan.optim, ()), plan, head=None if split is None else split[1],
        attention_heads=loaded.config["num_attention_heads"], rows=1, tokens=tokens,
    )  # fmt: skip


def extend(one: MemoryEstimate, two: MemoryEstimate, blocks: int) -> float:
    """GiB of a model of so many blocks, from those of one and two."""
    parts = {
        field.name: getattr(one, field.name) + (blocks - 1) * (getattr(two, field.name) - getattr(one, field.name))
        for field in fields(one)
    }
    return MemoryEstimate(**parts).total / 2**30


def show(need: float) -> str:
    """GiB, and on which Macs."""
    sure = [size for size, room in MACS.items() if need * ACCURACY <= room]
    near = [size for size, room in MACS.items() if need <= room and size not in sure]
    fits = f"{sure[0]} GB" if sure else ""
    near = [size for size in near if not sure or size < sure[0]]
    maybe = f"perhaps {near[0]} GB" if near else ""
    return f"{need:.1f} GiB: {', '.join(filter(None, (fits, maybe))) or 'none of these'}"


def table(models: dict[str, tuple[str, dict[str, Any]]]) -> str:
    """The Markdown table."""
    heads = [f"{way}, {tokens:,}" for way in WAYS for tokens in LENGTHS]
    lines = [f"| model | {' | '.join(heads)} |", f"|---{'|---' * len(heads)}|"]
    for name, (model_type, sizes) in models.items():
        cells = []
        with tempfile.TemporaryDirectory() as scratch:
            for way in WAYS:
                small = [
                    make_folder(
                        Path(scratch) / f"{way} {blocks}", model_type, {**sizes, "num_hidden_layers": blocks},
                        quantised=way == WAYS[0],
                    )
                    for blocks in (1, 2)
                ]  # fmt: skip
                for tokens in LENGTHS:
                    one, two = (measure(folder, way, tokens) for folder in small)
                    cells.append(show(extend(one, two, sizes["num_hidden_layers"])))
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], file=sys.stderr)
    return "\n".join(lines)


def main() -> None:
    """Print the table, or write it between the marks of a page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table between the marks of this page")
    options = parser.parse_args()
    text = table(MODELS)
    if options.write is None:
        print(text)
        return
    page = options.write.read_text(encoding="utf-8")
    begin, end = map(re.escape, MARKS)
    written = re.sub(f"{begin}.*{end}", lambda _: f"{MARKS[0]}\n{text}\n{MARKS[1]}", page, flags=re.DOTALL)
    options.write.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
