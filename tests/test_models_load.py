"""A loaded model: dtype, buffers, quantisation, and what it says about itself."""

from __future__ import annotations

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors.numpy import save_file
from tiny_checkpoints import LLAMA, llama_tensors, write_llama

from hf_mlx.errors import ModelError
from hf_mlx.models.architectures import counts_every_label
from hf_mlx.models.load import load_model
from hf_mlx.settings.plan import ModelPlan, PrecisionPlan

IDS = mx.array([[5, 9, 2, 40, 33, 7, 21]])


def test_a_verified_model_loads_in_eval_mode_with_its_config_as_written(tmp_path):
    loaded = load_model(write_llama(tmp_path), ModelPlan())

    assert loaded.state == "verified"
    assert loaded.config == json.loads((tmp_path / "config.json").read_text())
    assert loaded.path == tmp_path
    assert loaded.accepts_loss_kwargs
    assert not loaded.model.training
    assert loaded.model(IDS).shape == (1, 7, LLAMA["vocab_size"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_parameters_take_the_planned_dtype(dtype, tmp_path):
    loaded = load_model(write_llama(tmp_path), ModelPlan(precision=PrecisionPlan(dtype=dtype)))

    dtypes = [v.dtype for _, v in tree_flatten(loaded.model.parameters())]
    assert len(dtypes) == 21
    assert set(dtypes) == {getattr(mx, dtype)}


def test_rope_theta_is_read_in_either_spelling(tmp_path):
    new = load_model(write_llama(tmp_path / "new"), ModelPlan()).model(IDS)
    old_config = {"rope_parameters": None, "rope_theta": 5000.0, "rope_scaling": None}
    old = load_model(write_llama(tmp_path / "old", **old_config), ModelPlan()).model(IDS)
    other = load_model(write_llama(tmp_path / "other", **{**old_config, "rope_theta": 1e4}), ModelPlan()).model(IDS)

    assert mx.array_equal(new, old)
    assert not mx.allclose(new, other)


def test_shards_load_like_one_file(tmp_path):
    whole = load_model(write_llama(tmp_path / "whole"), ModelPlan()).model(IDS)
    tensors = llama_tensors()
    shards = write_llama(tmp_path / "shards")
    (shards / "model.safetensors").unlink()
    files = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    placed = {name: files[i % 2] for i, name in enumerate(sorted(tensors))}
    for file in files:
        save_file({n: t for n, t in tensors.items() if placed[n] == file}, shards / file, metadata={"format": "pt"})
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))

    assert mx.array_equal(load_model(shards, ModelPlan()).model(IDS), whole)


def test_a_tied_model_takes_no_head_from_the_file(tmp_path):
    tied = {**LLAMA, "tie_word_embeddings": True}
    plain = load_model(write_llama(tmp_path / "plain", llama_tensors(tied), tie_word_embeddings=True), ModelPlan())
    stale = {**llama_tensors(tied), "lm_head.weight": np.ones((64, 32), np.float32)}
    both = load_model(write_llama(tmp_path / "both", stale, tie_word_embeddings=True), ModelPlan())

    assert mx.array_equal(plain.model(IDS), both.model(IDS))


def test_a_sliding_window_changes_only_what_lies_beyond_it(tmp_path):
    mistral = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    wide = load_model(write_llama(tmp_path / "wide", sliding_window=None, **mistral), ModelPlan()).model(IDS)
    short = load_model(write_llama(tmp_path / "short", sliding_window=3, **mistral), ModelPlan()).model(IDS)

    assert mx.allclose(wide[:, :3], short[:, :3], atol=1e-6)
    assert not mx.allclose(wide[:, 3:], short[:, 3:], atol=1e-3)


def test_a_four_bit_request_quantises_the_blocks_and_says_so(tmp_path):
    loaded = load_model(write_llama(tmp_path), ModelPlan(quantization_bits=4, quantization_group_size=32))

    kinds = {name: type(module) for name, module in loaded.model.named_modules()}
    assert kinds["model.layers.0.self_attn.q_proj"] is nn.QuantizedLinear
    assert kinds["lm_head"] is nn.Linear
    assert kinds["model.embed_tokens"] is nn.Embedding
    assert len(loaded.notes) == 1
    assert "4-bit" in loaded.notes[0]
    # intermediate_size 48 is no multiple of 32: both down projections stay.
    assert "2 layer(s)" in loaded.notes[0]


def test_an_unknown_type_warns_once_and_names_the_doctor(tmp_path):
    folder = write_llama(tmp_path, model_type="mimo", num_nextn_predict_layers=0)
    bias = {"q": 32, "k": 16, "v": 16}
    tensors = llama_tensors()
    for i in range(2):
        tensors |= {f"model.layers.{i}.self_attn.{n}_proj.bias": np.zeros(w, np.float32) for n, w in bias.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    with pytest.warns(UserWarning, match="hf-mlx doctor") as said:
        loaded = load_model(folder, ModelPlan())

    assert len(said) == 1
    assert loaded.state == "unknown"


def test_loss_scaling_follows_the_class_that_the_config_names(tmp_path):
    named = {"architectures": ["Qwen3_5ForConditionalGeneration"]}

    assert not load_model(write_llama(tmp_path, **named), ModelPlan()).accepts_loss_kwargs


def test_the_class_name_decides_which_labels_the_loss_is_divided_by(tmp_path):
    loaded = load_model(write_llama(tmp_path, architectures=["LlamaForCausalLM"]), ModelPlan())

    assert not loaded.counts_every_label
    assert counts_every_label({"architectures": ["GPT2LMHeadModel"]})
    assert not counts_every_label({"architectures": ["Gemma3ForConditionalGeneration"]})
    assert not counts_every_label({})


def test_errors_are_value_errors_too():
    with pytest.raises(ValueError, match="no such folder"):
        load_model("./nowhere", ModelPlan())
    assert issubclass(ModelError, ValueError)
