"""Names and layouts, MLX to Hugging Face and back."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from tiny_checkpoints import llama_tensors, write_llama

from hf_mlx.errors import ModelError
from hf_mlx.models.layouts import Concat, Drop, HeadSplit, Rename, Scalar, Stack, Transpose
from hf_mlx.models.load import load_model
from hf_mlx.models.names import NameMap
from hf_mlx.models.weights import Checkpoint, Tensor
from hf_mlx.settings.plan import ModelPlan

STEPS = {
    "rename": (Rename("gpt.layers.{r*}", "model.h.{r*}"), {"gpt.layers.0.a.weight": (2, 3), "other.weight": (1,)}),
    "transpose": (Transpose("{p*}.conv1d.weight"), {"x.conv1d.weight": (4, 1, 3), "x.weight": (2, 2)}),
    "scalar": (Scalar("{p*}.alpha"), {"m.alpha": (1,)}),
    "stack": (
        Stack("{p*}.experts.{e}.{n}.weight", "{p*}.switch.{n}.weight"),
        {f"l.experts.{e}.up.weight": (2, 3) for e in range(11)},
    ),
    "concat": (Concat("{p*}.gate_up", ("{p*}.gate.weight", "{p*}.up.weight"), axis=1), {"l.0.gate_up": (2, 6, 3)}),
    "head split": (HeadSplit("{p*}.kv_b", "{p*}.k", "{p*}.v", heads=2, nope=3), {"a.kv_b": (10, 4)}),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_undone_exactly(name):
    step, shapes = STEPS[name]
    random = np.random.default_rng(0)
    weights = {k: mx.array(random.standard_normal(s).astype(np.float32)) for k, s in shapes.items()}

    loaded = step.load(dict(weights))
    saved = step.save(dict(loaded))

    assert saved.keys() == weights.keys()
    assert all(mx.array_equal(saved[k], v) for k, v in weights.items())
    assert all(step.mlx_name(k) in loaded for k in weights)


def test_a_dropped_tensor_is_not_loaded_and_not_written():
    step = Drop("vision.{r*}")

    assert step.load({"vision.a.weight": mx.zeros(1), "text.weight": mx.zeros(1)}).keys() == {"text.weight"}


@given(experts=st.integers(1, 24))
def test_experts_keep_their_numbers_past_ten(experts):
    step = Stack("m.experts.{e}.weight", "m.switch.weight")
    weights = {f"m.experts.{e}.weight": mx.array([float(e)]) for e in range(experts)}

    stacked = step.load(weights)["m.switch.weight"]

    assert stacked[:, 0].tolist() == [float(e) for e in range(experts)]


def test_a_plain_model_goes_back_bit_for_bit(tmp_path):
    names = (loaded := load_model(write_llama(tmp_path), ModelPlan())).names
    stored = llama_tensors()

    exported = names.export_weights(dict(tree_flatten(loaded.model.parameters())))

    assert exported.keys() == stored.keys() == names.stored
    assert all(np.array_equal(np.array(exported[k]), v) for k, v in stored.items())
    assert names.untouched == frozenset()


def test_imported_weights_are_the_parameters(tmp_path):
    loaded = load_model(write_llama(tmp_path), ModelPlan())
    params = dict(tree_flatten(loaded.model.parameters()))

    imported = loaded.names.import_weights({k: mx.array(v) for k, v in llama_tensors().items()})

    assert imported.keys() == params.keys()
    assert all(mx.array_equal(imported[k], v) for k, v in params.items())


def test_an_expert_module_names_every_expert():
    names = _mixture(experts=3)

    paths = names.to_hf_modules("model.layers.0.mlp.switch_mlp.up_proj")

    assert paths == [f"model.layers.0.mlp.experts.{e}.up_proj" for e in range(3)]
    assert {names.from_hf_module(p) for p in paths} == {"model.layers.0.mlp.switch_mlp.up_proj"}
    with pytest.raises(ModelError, match="stacks 3 modules"):
        names.to_hf_module("model.layers.0.mlp.switch_mlp.up_proj")


def test_module_paths_follow_the_live_model_where_it_differs_from_the_file():
    checkpoint = Checkpoint(("model.safetensors",), {"language_model.model.a.weight": Tensor("F32", (1,), "m")}, "hf")
    live = (Rename("language_model.model.{r*}", "model.language_model.{r*}"),)
    names = NameMap((), live, {"language_model.model.a.weight": (1,)}, checkpoint)

    assert names.to_hf_name("language_model.model.a.weight") == "language_model.model.a.weight"
    assert names.to_hf_module("language_model.model.a") == "model.language_model.a"
    assert names.from_hf_module("model.language_model.a") == "language_model.model.a"


def test_only_the_models_own_names_and_shapes_are_exported(tmp_path):
    loaded = load_model(write_llama(tmp_path), ModelPlan())
    params = dict(tree_flatten(loaded.model.parameters()))

    with pytest.raises(ModelError, match="does not have"):
        loaded.names.export_weights({**params, "model.layers.0.extra.weight": mx.zeros((1,))})
    with pytest.raises(ModelError, match="shape"):
        loaded.names.export_weights({**params, "model.norm.weight": mx.zeros((1,))})


def test_packed_weights_are_not_exported(tmp_path):
    plan = ModelPlan(quantization_bits=4, quantization_group_size=32)
    loaded = load_model(write_llama(tmp_path), plan)

    with pytest.raises(ModelError, match="quantised"):
        loaded.names.export_weights(dict(tree_flatten(loaded.model.parameters())))


def _mixture(experts: int) -> NameMap:
    stored = {f"model.layers.0.mlp.experts.{e}.up_proj.weight": Tensor("F32", (4, 2), "m") for e in range(experts)}
    step = Stack("{p*}.mlp.experts.{e}.{n}.{kind}", "{p*}.mlp.switch_mlp.{n}.{kind}")
    shapes = {"model.layers.0.mlp.switch_mlp.up_proj.weight": (experts, 4, 2)}
    return NameMap((step,), (), shapes, Checkpoint(("m",), stored, "hf"))
