"""The first values of an adapter."""

import mlx.core as mx
import numpy as np
import pytest
from adapter_folders import logits, make_llama
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from hf_mlx.adapters.attach import attach
from hf_mlx.models.load import load_model
from hf_mlx.settings.plan import LoraPlan, ModelPlan


@pytest.fixture
def folder(tmp_path):
    return make_llama(tmp_path / "base")


@pytest.mark.parametrize("kind", [True, "gaussian"])
def test_the_model_computes_what_it_did_before(folder, kind):
    loaded = load_model(folder, ModelPlan())
    before = logits(loaded)
    attach(loaded, LoraPlan(target_modules="all-linear", init_lora_weights=kind), seed=1)
    assert np.array_equal(logits(loaded), before)


def test_without_initialisation_it_does_not(folder):
    loaded = load_model(folder, ModelPlan())
    before = logits(loaded)
    attach(loaded, LoraPlan(init_lora_weights=False), seed=1)
    assert not np.allclose(logits(loaded), before, atol=1e-3)


def test_the_seed_decides(folder):
    def first_a(seed):
        return next(iter(attach(load_model(folder, ModelPlan()), LoraPlan(), seed=seed).trainable().values()))

    assert mx.array_equal(first_a(3), first_a(3)).item()
    assert not mx.array_equal(first_a(3), first_a(4)).item()


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bits", [None, 8])
def test_the_mlx_lm_start_is_mlx_lms_own(folder, layers, bits):
    keys = {"self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"}
    theirs = load_model(folder, ModelPlan(quantization_bits=bits))
    theirs.model.freeze()
    mx.random.seed(11)
    linear_to_lora_layers(theirs.model, layers, {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": keys})
    expected = {
        name.replace("lora_a", "lora_A").replace("lora_b", "lora_B"): value.T
        for name, value in tree_flatten(theirs.model.trainable_parameters())
    }
    loaded = load_model(folder, ModelPlan(quantization_bits=bits))
    plan = LoraPlan(r=4, lora_alpha=8, target_modules=("q_proj", "v_proj", "down_proj"))
    adapter = attach(loaded, plan, seed=11, last_n_layers=layers, start="mlx_lm")
    ours = adapter.trainable()
    assert set(ours) == set(expected)
    assert all(mx.array_equal(ours[name], expected[name]).item() for name in ours)
    assert len(ours) == 6 * layers
    assert np.array_equal(logits(loaded), logits(theirs))
