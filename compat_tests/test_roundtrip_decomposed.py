"""PiSSA and OLoRA, whose start is taken out of the base: the start, trl's curve, and the adapter in PEFT."""

from __future__ import annotations

import warnings

import numpy as np
import peft
import pytest
import transformers
from adapter_pairs import (
    CLOSE,
    adapt_mlx,
    adapt_torch,
    distance,
    load_mlx,
    load_torch,
    logits_mlx,
    logits_torch,
    make_base,
)
from pairs import assert_same_curve, rows_of, run_mlx, run_trl, tiny_model
from training_checks import make_base as latent_base

from hf_mlx.adapters.export import export_adapter
from hf_mlx.adapters.merge import merge_adapter
from hf_mlx.adapters.read import import_adapter
from hf_mlx.errors import AdapterError

pytestmark = pytest.mark.usefixtures("uncompiled")

KINDS = ("pissa", "olora")
LORA = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}


# More ranks than a weight has vectors: PEFT makes as many as there are, with the factor of those that were asked for.
WIDE = {"r": 4096, "target_modules": ["k_proj", "down_proj"]}
SETS = [{}, {"use_rslora": True}, {"use_dora": True}, {"rank_pattern": {"q_proj": 2}}, WIDE, {**WIDE, "use_dora": True}]


@pytest.mark.parametrize("settings", SETS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_start_is_pefts(kind, settings, tmp_path):
    base = make_base("qwen3", tmp_path / "base")
    lora = {**LORA, **settings, "init_lora_weights": kind}
    loaded = load_mlx(base)
    plain = logits_mlx(loaded.model)
    adapter = adapt_mlx(loaded, lora, moved=False)
    theirs = adapt_torch(load_torch(base), lora, moved=False)
    # The part is in the adapter, the rest in the base: together the model of before.
    assert distance(logits_mlx(loaded.model), plain) <= CLOSE
    layers = dict(theirs.base_model.model.named_modules())
    for target in adapter.targets:
        layer, torch_layer = dict(loaded.model.named_modules())[target.mlx_path], layers[target.hf_path]
        a, b = (getattr(torch_layer, name)["default"].weight.detach().numpy() for name in ("lora_A", "lora_B"))
        for found, right in ((layer.lora_A, a), (layer.lora_B, b)):
            # A factor of 6 / 4096 makes them large.
            assert np.allclose(np.abs(np.array(found)), np.abs(right), atol=1e-4 * max(1.0, np.abs(right).max()))
        rest = torch_layer.base_layer.weight.detach().numpy()
        assert np.allclose(np.array(layer.base_layer.weight), rest, atol=1e-5)
    assert len(adapter.targets) >= 4


@pytest.mark.parametrize("settings", [{}, WIDE])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_cross_both_ways_and_merge(kind, settings, tmp_path):
    base = make_base("llama", tmp_path / "base")
    lora = {**LORA, **settings, "init_lora_weights": kind}
    adapter = adapt_mlx(load_mlx(base), lora)
    export_adapter(adapter, tmp_path / "ours", base=str(base))
    expected = logits_mlx(adapter.loaded.model)
    with warnings.catch_warnings(action="ignore"):
        read = peft.PeftModel.from_pretrained(load_torch(base), tmp_path / "ours").eval()
    assert distance(expected, logits_torch(read)) <= CLOSE
    again = import_adapter(tmp_path / "ours", load_mlx(base))
    assert distance(logits_mlx(again.loaded.model), expected) <= CLOSE
    merge_adapter(again, tmp_path / "merged")
    assert distance(logits_torch(load_torch(tmp_path / "merged")), expected) <= CLOSE
    theirs = adapt_torch(load_torch(base), lora)
    with warnings.catch_warnings(action="ignore"):
        theirs.save_pretrained(tmp_path / "theirs")
    assert (
        distance(logits_mlx(import_adapter(tmp_path / "theirs", load_mlx(base)).loaded.model), logits_torch(theirs))
        <= CLOSE
    )


SETTINGS = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "max_length": 40,
}


@pytest.mark.parametrize("as_object", [False, True], ids=["by name", "an object"])
def test_the_curve_is_trls(as_object, tmp_path):
    base = tiny_model("llama", tmp_path / "base")
    lora = {**LORA, "init_lora_weights": "olora"}
    model = (lambda: transformers.AutoModelForCausalLM.from_pretrained(base)) if as_object else base
    words = {"processing_class": transformers.AutoTokenizer.from_pretrained(base)}
    rows = rows_of("text", 6)
    theirs, ours = run_trl(model, SETTINGS, rows, lora, **words), run_mlx(model, SETTINGS, rows, lora, **words)
    assert assert_same_curve(theirs, ours, relative=1e-4, weights=1e-3) > 20


def test_pissas_curve_is_trls(tmp_path):
    base = tiny_model("qwen3", tmp_path / "base")
    lora = {**LORA, "init_lora_weights": "pissa"}
    rows = rows_of("text", 6)
    theirs, ours = run_trl(base, SETTINGS, rows, lora), run_mlx(base, SETTINGS, rows, lora)
    for run in (theirs, ours):
        # Singular vectors have no sign of their own.
        run.weights = {key: np.abs(value) for key, value in run.weights.items()}
    assert assert_same_curve(theirs, ours, relative=1e-4, weights=1e-3) > 20


def test_more_ranks_than_vectors_have_trls_curve(tmp_path):
    base = tiny_model("qwen3", tmp_path / "base")
    lora = {**LORA, "r": 40, "target_modules": ["k_proj", "v_proj"], "init_lora_weights": "olora"}
    rows = rows_of("text", 6)
    theirs, ours = run_trl(base, SETTINGS, rows, lora), run_mlx(base, SETTINGS, rows, lora)
    assert {min(value.shape) for value in ours.weights.values()} == {32}
    assert assert_same_curve(theirs, ours, relative=1e-4, weights=1e-3) > 20


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_mlx_holds_in_parts_is_refused_by_name(kind, tmp_path):
    base = latent_base("deepseek_v3", tmp_path / "base")
    with pytest.raises(AdapterError, match=r"(?s)kv_b_proj, which MLX holds in parts.*init_lora_weights=True"):
        adapt_mlx(load_mlx(base), {**LORA, "target_modules": ["kv_b_proj"], "init_lora_weights": kind})
