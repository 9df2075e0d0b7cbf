"""Which modules a LoraConfig selects, by PEFT's matching rules."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from adapter_folders import logits, make_llama
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


def test_patterns_that_match_nothing_change_nothing_and_are_said_once(tmp_path):
    loaded = load_model(make_llama(tmp_path / "base"), ModelPlan())
    plan = LoraPlan(rank_pattern={"qq_proj": 4, "q_proj": 2}, alpha_pattern={"up_proj": 3})
    adapter = attach(loaded, plan, seed=0)
    assert {(t.hf_path.rsplit(".", 1)[-1], t.r, t.alpha) for t in adapter.targets} == {
        ("q_proj", 2, 8),
        ("v_proj", 8, 8),
    }
    assert adapter.notes == (
        "rank_pattern={'qq_proj': 4} matches no adapted module and has no effect, as in PEFT",
        "alpha_pattern={'up_proj': 3} matches no adapted module and has no effect, as in PEFT",
    )


def test_a_string_for_modules_to_save_is_read_by_letters_and_said(tmp_path):
    loaded = load_model(make_llama(tmp_path / "base"), ModelPlan())
    adapter = attach(loaded, LoraPlan(modules_to_save=tuple("d")), seed=0)
    assert [site.hf_path for site in adapter.blueprint.saved] == ["lm_head"]
    assert any("letter by letter: trained in full are lm_head" in line for line in adapter.notes)


REFUSALS = {
    "nothing matches": ({"target_modules": ("query",)}, "names among embed_tokens, q_proj, k_proj"),
    "everything is excluded": ({"target_modules": ("q_proj",), "exclude_modules": ("q_proj",)}, "exclude_modules"),
    "no such layer": ({"target_modules": ("q_proj",), "layers_to_transform": (9,)}, "layers_to_transform"),
    "an empty list": ({"target_modules": ()}, "at least one module"),
    "a container": ({"target_modules": ("mlp",)}, "model.layers.0.mlp, a MLP"),
    "a norm": ({"target_modules": ("input_layernorm",)}, "a RMSNorm"),
    "rank zero": ({"r": 0}, "r=0 for model.layers.0.self_attn.q_proj"),
    "a rank below zero in a pattern": ({"rank_pattern": {"q_proj": -1}}, "r=-1"),
    "rows below zero": ({"trainable_token_indices": (-1,)}, "ids from 0 to 127, each once"),
    "rows beyond the table": ({"trainable_token_indices": (5, 128)}, "ids from 0 to 127, each once"),
    "a row twice": ({"trainable_token_indices": (5, 6, 5)}, "each once"),
    "rows of an inner layer": ({"trainable_token_indices": {"q_proj": (1,)}}, "trainable_token_indices names 'q_proj'"),
    "rows of what is trained in full": (
        {"trainable_token_indices": (1,), "modules_to_save": ("embed_tokens",)},
        "which modules_to_save trains in full",
    ),
    "rows of what is adapted": (
        {"trainable_token_indices": (1,), "target_modules": ("embed_tokens",)},
        "which target_modules adapts too",
    ),
    "modules_to_save as a string": (
        {"modules_to_save": tuple("lm_head")},
        "a string, which PEFT reads letter by letter, and so matches model, which target_modules adapts too",
    ),
    "modules_to_save as a string within another": (
        {"modules_to_save": tuple("jp"), "target_modules": ("lm_head",)},
        "both model.layers.0.mlp.gate_proj and a module around it",
    ),
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
def test_training_one_end_of_a_tied_pair_unties_it_and_leaves_the_other(tmp_path, settings):
    loaded = load_model(make_llama(tmp_path / "base", tied=True), ModelPlan())
    before = logits(loaded)
    adapter = attach(loaded, LoraPlan(**settings), seed=0)
    assert loaded.untied and {t.hf_path for t in adapter.targets} | {s.hf_path for s in adapter.blueprint.saved}
    np.testing.assert_allclose(logits(loaded), before, rtol=0, atol=1e-6)
    ends = {"lm_head": loaded.model.lm_head, "embed_tokens": loaded.model.model.embed_tokens}
    trained = [name for name, end in ends.items() if end.trainable_parameters()]
    assert trained == [name for name in ends if name in str(settings)]


def test_a_tied_pair_that_cannot_be_trained_apart_is_refused_and_stays_tied(tmp_path):
    loaded = load_model(make_llama(tmp_path / "base", tied=True), ModelPlan())
    with pytest.raises(AdapterError, match="match no module"):
        attach(loaded, LoraPlan(target_modules=("query",), modules_to_save=("lm_head",)), seed=0)
    assert not loaded.untied and "lm_head" not in loaded.model
    assert len(logits(loaded))


@pytest.mark.parametrize(
    "settings", [{"target_modules": ("embed_tokens",)}, {"modules_to_save": ("lm_head",)}], ids=["LoRA", "in full"]
)
def test_a_head_that_is_the_embedding_in_mlx_too_is_refused(tmp_path, settings, monkeypatch):
    loaded = load_model(make_llama(tmp_path / "base", tied=True), ModelPlan())
    # As gemma's and gpt2's code: nothing to switch.
    monkeypatch.delattr(loaded.model.args, "tie_word_embeddings")
    monkeypatch.setattr(type(loaded.model.args), "tie_word_embeddings", property(lambda _: 1))
    with pytest.raises(AdapterError, match=r"ties|the head is the embedding"):
        attach(loaded, LoraPlan(**settings), seed=0)


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
