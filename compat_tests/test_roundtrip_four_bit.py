"""Bases that bitsandbytes quantised to 4 bits: its own values, and the curve of a torch model that has them."""

from __future__ import annotations

import json
import warnings

import mlx.core as mx
import numpy as np
import peft
import pytest
import torch
import transformers
from adapter_pairs import distance, load_mlx, load_torch, logits_mlx, logits_torch
from four_bit_folders import write_pair
from mlx.utils import tree_flatten
from pairs import assert_same_curve, rows_of, run_mlx, run_trl, tiny_model
from safetensors.numpy import load_file, save_file

from hf_mlx.adapters.layers import dense_weight
from hf_mlx.adapters.merge import measure_survival, merge_adapter
from hf_mlx.adapters.read import import_adapter
from hf_mlx.errors import AdapterError, ModelError
from hf_mlx.models.blockwise import BlockLinear
from hf_mlx.trainers.sft import MLXSFTTrainer

pytestmark = pytest.mark.usefixtures("uncompiled")

# Every width is whole blocks but one, the tall one of "odd".
SHAPES = {
    "nf4, double": ("llama", {}, {"intermediate_size": 128}),
    "nf4, odd": ("qwen3", {"double": False, "dtype": "float32"}, {"intermediate_size": 96}),
    "fp4, wide blocks": ("gemma3_text", {"kind": "fp4", "dtype": "float16", "block": 128}, {"hidden_size": 128}),
    "nf4, biases": ("qwen2", {"double": False}, {"intermediate_size": 128}),
}
LORA = {"r": 4, "target_modules": "all-linear"}


def make(name, folder):
    family, options, sizes = SHAPES[name]
    base = tiny_model(family, folder / "base", **sizes)
    count = write_pair(base, folder / "coded", folder / "dense", **options)
    assert count == 14
    return folder / "coded", folder / "dense"


@pytest.mark.parametrize("name", SHAPES)
def test_the_values_are_the_checkpoints(name, tmp_path):
    coded, dense = make(name, tmp_path)
    loaded, plain = load_mlx(coded), load_mlx(dense)
    expected = {path: module["weight"] for path, module in plain.model.named_modules() if "weight" in module}
    held = [path for path, module in loaded.model.named_modules() if isinstance(module, BlockLinear)]
    modules = dict(loaded.model.named_modules())
    assert len(held) == {"nf4, odd": 12, "fp4, wide blocks": 10}.get(name, 14)
    for path, value in expected.items():
        own = dense_weight(modules[path])
        assert mx.array_equal(own.astype(mx.float32), value.astype(mx.float32)).item(), path
    assert len(expected) > 14
    assert distance(logits_mlx(loaded.model), logits_torch(load_torch(dense))) <= 1e-5


def test_the_codes_stay_codes_in_memory(tmp_path):
    coded, dense = make("nf4, double", tmp_path)
    sizes = []
    for base in (coded, dense):
        parameters = dict(tree_flatten(load_mlx(base).model.parameters()))
        sizes.append(sum(value.nbytes for path, value in parameters.items() if "proj" in path))
    assert sizes[0] / sizes[1] == pytest.approx((0.5 + 4 / 64) / 4)


SETTINGS = {"max_steps": 20, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "logging_steps": 1, "seed": 3}
SETTINGS |= {"max_length": 48}


@pytest.mark.parametrize("name", ["nf4, double", *(pytest.param(n, marks=pytest.mark.wide) for n in list(SHAPES)[1:])])
def test_twenty_steps_have_the_curve_of_the_dequantised_weights(name, tmp_path):
    coded, dense = make(name, tmp_path)
    rows = rows_of("text", 12)
    theirs = run_trl(dense, SETTINGS, rows, LORA)
    ours = run_mlx(coded, SETTINGS, rows, LORA)
    assert assert_same_curve(theirs, ours, relative=1e-4, weights=5e-3) > 100


def test_an_adapter_on_codes_is_saved_loaded_and_merged(tmp_path):
    coded, dense = make("nf4, double", tmp_path)
    with warnings.catch_warnings(action="ignore"):
        from datasets import Dataset
        from trl import SFTConfig

        args = SFTConfig(
            output_dir=str(tmp_path / "run"), **SETTINGS | {"max_steps": 3, "bf16": False, "use_cpu": True}
        )
        # The request is the checkpoint's own: transformers keeps that one, too.
        asked = transformers.BitsAndBytesConfig(load_in_4bit=True)
        trainer = MLXSFTTrainer(
            str(coded),
            args,
            train_dataset=Dataset.from_list(rows_of("text", 6)),
            peft_config=peft.LoraConfig(**LORA),
            quantization_config=asked,
        )
        trainer.train()
        trainer.save_model(str(tmp_path / "adapter"))
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        coded
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        expected = logits_torch(peft.PeftModel.from_pretrained(load_torch(dense), tmp_path / "adapter").eval())
    adapter = import_adapter(tmp_path / "adapter", load_mlx(coded))
    assert distance(logits_mlx(adapter.loaded.model), expected) <= 1e-5
    kept = measure_survival(adapter)
    assert len(kept) == 14
    assert all(0 <= share < 0.9 for share in kept.values())
    with pytest.raises(AdapterError, match="quantised base"):
        merge_adapter(adapter, tmp_path / "no")
    merge_adapter(adapter, tmp_path / "merged", dequantize=True)
    with torch.no_grad():
        merged = logits_torch(load_torch(tmp_path / "merged").float())
    # Merged weights are written in the dtype that the codes stand for.
    assert distance(merged, expected) <= 2e-2


def _cut(tensors, name):
    tensors[name] = tensors[name][:-1]


def _other_table(tensors, name):
    tensors[f"{name}.quant_map"] = np.linspace(-1, 1, 16, dtype=np.float32)


def _no_scales(tensors, name):
    del tensors[f"{name}.absmax"]


def _no_json(tensors, name):
    tensors[f"{name}.quant_state.bitsandbytes__nf4"] = np.zeros(7, np.uint8)


@pytest.mark.parametrize("damage", [_cut, _other_table, _no_scales, _no_json])
def test_damaged_codes_are_refused(damage, tmp_path):
    coded, _ = make("nf4, double", tmp_path)
    tensors = load_file(coded / "model.safetensors")
    damage(tensors, "model.layers.0.self_attn.q_proj.weight")
    save_file(tensors, coded / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="4 bits"):
        load_mlx(coded)


def test_eight_bits_are_refused_with_the_cause(tmp_path):
    coded, _ = make("nf4, double", tmp_path)
    config = json.loads((coded / "config.json").read_text())
    config["quantization_config"] |= {"load_in_4bit": False, "load_in_8bit": True}
    (coded / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="rounded activations"):
        load_mlx(coded)
