"""Bases in each of MLX's quantised formats: the curve and the adapter of a torch model with the same values."""

from __future__ import annotations

import json
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from adapter_pairs import CLOSE, distance, load_mlx, load_torch, logits_mlx, logits_torch, quiet
from mlx_lm.utils import save
from pairs import assert_same_curve, rows_of, run_mlx, run_trl, tokenizer
from training_checks import make_base

from hf_mlx.adapters.layers import dense_weight
from hf_mlx.models.save import write_model

MODES = {"affine": (32, 4), "mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}
SETTINGS = {"max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "logging_steps": 1, "seed": 3}
SETTINGS |= {"max_length": 32, "router_aux_loss_coef": 0.0}
LORA = {"r": 4, "target_modules": "all-linear"}
CASES = [
    ("llama", "mxfp4"),
    ("qwen3_moe", "nvfp4"),
    *(pytest.param("llama", mode, marks=pytest.mark.wide) for mode in ("affine", "mxfp8", "nvfp4")),
    *(pytest.param("qwen3_moe", mode, marks=pytest.mark.wide) for mode in ("affine", "mxfp8", "mxfp4")),
    *(pytest.param("gpt_oss", mode, marks=pytest.mark.wide) for mode in MODES),
]
# Widths that are whole groups.
SIZES = {"intermediate_size": 128, "moe_intermediate_size": 64, "head_dim": 16}


def convert(model_type, mode, folder):
    """A folder as ``mlx_lm.convert -q --q-mode`` writes it, and one of transformers with the same values."""
    sizes = SIZES if model_type != "llama" else {"intermediate_size": 128}
    base = make_base(
        model_type,
        folder / "base",
        **{k: v for k, v in sizes.items() if model_type != "gpt_oss" or k != "moe_intermediate_size"},
    )
    group, bits = MODES[mode]
    loaded, packed = load_mlx(base), 0
    nn.quantize(loaded.model, group_size=group, bits=bits, mode=mode)
    params: dict[str, Any] = {}
    for path, module in loaded.model.named_modules():
        own = {name: v for name, v in module.items() if isinstance(v, mx.array) and not name.startswith("_")}
        if "scales" in module:
            own = {"weight": dense_weight(module).astype(mx.float32)} | {k: own[k] for k in ("bias",) if k in own}
            packed += 1
        params |= {f"{path}.{name}": value for name, value in own.items()}
    (folder / "dense").mkdir()
    write_model(loaded, folder / "dense", params)
    with quiet():
        config = json.loads((base / "config.json").read_text())
        config["quantization"] = {"group_size": group, "bits": bits, "mode": mode}
        save(folder / "mlx", base, loaded.model, tokenizer(), config)
        tokenizer().save_pretrained(folder / "dense")
    (folder / "mlx" / "README.md").write_text(f"---\nlibrary_name: mlx\nbase_model: {folder / 'dense'}\n---\n")
    assert packed >= 20
    return folder / "mlx", folder / "dense"


@pytest.mark.parametrize(("model_type", "mode"), CASES)
def test_the_curve_is_that_of_the_values(model_type, mode, tmp_path):
    coded, dense = convert(model_type, mode, tmp_path)
    assert distance(logits_mlx(load_mlx(coded).model), logits_torch(load_torch(dense))) <= CLOSE
    rows = rows_of("text", 12)
    theirs = run_trl(dense, SETTINGS, rows, LORA)
    ours = run_mlx(coded, SETTINGS, rows, LORA)
    assert assert_same_curve(theirs, ours, relative=1e-4, weights=5e-3) > 40
