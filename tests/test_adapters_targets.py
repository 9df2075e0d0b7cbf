"""Which modules a LoraConfig selects, by PEFT's matching rules."""

from pathlib import Path

import mlx.core as mx
import pytest
from adapter_folders import make_llama
from mlx.utils import tree_flatten

from hf_mlx.adapters.attach import attach
from hf_mlx.adapters.blueprint import draw_blueprint
from hf_mlx.adapters.matching import minimal_names
from hf_mlx.errors import AdapterError
from hf_mlx.models.load import load_model
from hf_mlx.settings.plan import LoraPlan, ModelPlan


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_model(make_llama(tmp_path_factory.mktemp("base")), ModelPlan())


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return load_model(make_llama(tmp_path_factory.mktemp("tied"), tied=True), ModelPlan())


def chosen(loaded, **settings):
    return [t.hf_path.replace("model.layers.", "") for t in draw_blueprint(loaded, LoraPlan(**settings)).targets]


def in_both_layers(*names):
    return [f"{layer}.{name}" for layer in range(2) for name in names]


ATTENTION = [f"self_attn.{name}_proj" for name in "qkvo"]
MLP = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
SELECTIONS = {
    "the default of the architecture": ({}, in_both_layers("self_attn.q_proj", "self_attn.v_proj")),
    "a suffix": ({"target_modules": ("down_proj",)}, in_both_layers("mlp.down_proj")),
    "a longer suffix": ({"target_modules": ("self_attn.k_proj",)}, in_both_layers("self_attn.k_proj")),
    "an exact path": ({"target_modules": ("model.layers.1.mlp.up_proj",)}, ["1.mlp.up_proj"]),
    "never part of a name": ({"target_modules": ("proj", "k_proj")}, in_both_layers("self_attn.k_proj")),
    "a regex on the whole path": (
        {"target_modules": r".*\.1\..*\.[qk]_proj"},
        ["1.self_attn.q_proj", "1.self_attn.k_proj"],
    ),
    "all linear layers but the head": ({"target_modules": "all-linear"}, in_both_layers(*ATTENTION, *MLP)),
    "the head by name": ({"target_modules": ("lm_head",)}, ["lm_head"]),
    "the embedding": ({"target_modules": ("embed_tokens",)}, ["model.embed_tokens"]),
    "without the excluded": (
        {"target_modules": ("q_proj", "k_proj"), "exclude_modules": ("q_proj",)},
        in_both_layers("self_attn.k_proj"),
    ),
    "excluded by regex": ({"target_modules": ("q_proj",), "exclude_modules": r".*\.0\..*"}, ["1.self_attn.q_proj"]),
    "one layer": ({"target_modules": ("q_proj",), "layers_to_transform": (1,)}, ["1.self_attn.q_proj"]),
    "one layer under a pattern": (
        {"target_modules": ("q_proj",), "layers_to_transform": (0,), "layers_pattern": ("layers",)},
        ["0.self_attn.q_proj"],
    ),
    "not what is trained in full": (
        {"target_modules": ("q_proj", "up_proj"), "modules_to_save": ("mlp",)},
        in_both_layers("self_attn.q_proj"),
    ),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_selects(loaded, name):
    settings, expected = SELECTIONS[name]
    assert chosen(loaded, **settings) == expected


def test_rank_and_alpha_patterns_take_the_first_match(loaded):
    plan = LoraPlan(
        r=8,
        lora_alpha=16,
        target_modules=("q_proj", "k_proj"),
        rank_pattern={r"0\.self_attn\.q_proj": 2, "q_proj": 4},
        alpha_pattern={"k_proj": 3},
        use_rslora=True,
    )
    targets = {t.hf_path[13:].replace("self_attn.", ""): t for t in draw_blueprint(loaded, plan).targets}
    assert {name: (t.r, t.alpha) for name, t in targets.items()} == {
        "0.q_proj": (2, 16),
        "0.k_proj": (8, 3),
        "1.q_proj": (4, 16),
        "1.k_proj": (8, 3),
    }
    assert targets["1.q_proj"].scale == 16 / 2


REFUSALS = {
    "nothing matches": ({"target_modules": ("query",)}, "names among embed_tokens, q_proj, k_proj"),
    "everything is excluded": ({"target_modules": ("q_proj",), "exclude_modules": ("q_proj",)}, "exclude_modules"),
    "no such layer": ({"target_modules": ("q_proj",), "layers_to_transform": (9,)}, "layers_to_transform"),
    "an empty list": ({"target_modules": ()}, "at least one module"),
    "a container": ({"target_modules": ("mlp",)}, "model.layers.0.mlp, a MLP"),
    "a norm": ({"target_modules": ("input_layernorm",)}, "a RMSNorm"),
    "rank zero": ({"r": 0}, "r=0 for model.layers.0.self_attn.q_proj"),
    "a rank below zero in a pattern": ({"rank_pattern": {"q_proj": -1}}, "r=-1"),
    "a pattern that matches nothing": ({"rank_pattern": {"qq_proj": 4}}, "rank_pattern={'qq_proj'"),
    "target_parameters": ({"target_parameters": ("mlp.weight",)}, "target_parameters"),
    "DoRA on an embedding": (
        {"use_dora": True, "target_modules": ("embed_tokens",)},
        "use_dora=True with the embedding",
    ),
    "lora_bias on an embedding": ({"lora_bias": True, "target_modules": ("embed_tokens",)}, "lora_bias=True"),
    "modules_to_save that match nothing": ({"modules_to_save": ("classifier",)}, "modules_to_save names 'classifier'"),
    "modules_to_save over a target": (
        {"target_modules": ("q_proj",), "modules_to_save": ("_proj",)},
        "which target_modules adapts too",
    ),
    "a bias that is saved as well": (
        {"bias": "all", "modules_to_save": ("self_attn",), "target_modules": ("up_proj",)},
        'bias="all"',
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refuses_and_leaves_the_model_as_it_was(loaded, name):
    settings, message = REFUSALS[name]
    before = [path for path, _ in tree_flatten(loaded.model.parameters())]
    with pytest.raises(AdapterError) as caught:
        attach(loaded, LoraPlan(**settings), seed=0)
    assert message in str(caught.value)
    assert [path for path, _ in tree_flatten(loaded.model.parameters())] == before


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ("lm_head", "q_proj")},
        {"target_modules": ("embed_tokens",)},
        {"modules_to_save": ("embed_tokens",)},
        {"modules_to_save": ("lm_head",)},
    ],
)
def test_refuses_to_untie_a_tied_head(tied, settings):
    with pytest.raises(AdapterError, match=r"ties|the head is the embedding"):
        attach(tied, LoraPlan(**settings), seed=0)


def test_a_model_without_default_targets_says_so(loaded, monkeypatch):
    monkeypatch.setattr(loaded, "model_type", "qwen77")
    with pytest.raises(AdapterError, match="all-linear"):
        attach(loaded, LoraPlan(), seed=0)


def test_a_second_adapter_is_refused(tmp_path: Path):
    loaded = load_model(make_llama(tmp_path), ModelPlan())
    attach(loaded, LoraPlan(), seed=0)
    with pytest.raises(AdapterError, match="already carries an adapter"):
        attach(loaded, LoraPlan(), seed=0)


def test_only_the_adapter_is_trainable(tmp_path: Path):
    loaded = load_model(make_llama(tmp_path), ModelPlan())
    adapter = attach(loaded, LoraPlan(bias="lora_only", modules_to_save=("lm_head",)), seed=0)
    names = [adapter.hf_name(name) for name in adapter.trainable()]
    adapted = [
        f"base_model.model.model.layers.{i}.self_attn.{name}_proj.{leaf}"
        for i in range(2)
        for name in "qv"
        for leaf in ("base_layer.bias", "lora_A.weight", "lora_B.weight")
    ]
    assert names == [*adapted, "base_model.model.lm_head.weight"]
    assert sum(v.size for _, v in tree_flatten(loaded.model.trainable_parameters())) == sum(
        v.size for v in adapter.trainable().values()
    )


def test_minimal_names_select_exactly_the_targets():
    paths = ["a.0.q", "a.1.q", "a.0.k", "a.1.k"]
    assert minimal_names(["a.0.q", "a.1.q", "a.1.k"], paths) == ["q", "a.1.k"]


def test_last_layers_only(tmp_path: Path):
    loaded = load_model(make_llama(tmp_path), ModelPlan())
    adapter = attach(loaded, LoraPlan(target_modules=("q_proj",)), seed=0, last_n_layers=1)
    assert [t.hf_path for t in adapter.targets] == ["model.layers.1.self_attn.q_proj"]
    assert adapter.blueprint.selector == ("model.layers.1.self_attn.q_proj",)
    with pytest.raises(AdapterError, match="finetune_last_n_layers=3"):
        draw_blueprint(load_model(make_llama(tmp_path / "again"), ModelPlan()), LoraPlan(), 3)
    mx.eval(adapter.trainable())
