"""Every LoraConfig option, out to PEFT and back in: same logits, same keys, same config."""

import json
import warnings

import numpy as np
import peft
import pytest
import transformers
from adapter_pairs import (
    CLOSE,
    SEED,
    adapt_mlx,
    adapt_torch,
    distance,
    load_mlx,
    load_torch,
    logits_mlx,
    logits_torch,
    make_base,
    quiet,
    trained_by_peft,
)
from pairs import tiny_model
from safetensors.numpy import load_file
from sampling import sampled

from hf_mlx.adapters.attach import attach
from hf_mlx.adapters.export import export_adapter
from hf_mlx.adapters.merge import merge_adapter
from hf_mlx.adapters.read import read_adapter
from hf_mlx.settings.model_plan import resolve_lora

pytestmark = pytest.mark.usefixtures("uncompiled")

OPTIONS = {
    "default targets": {},
    "suffixes": {"target_modules": ["k_proj", "down_proj"]},
    "exact paths": {"target_modules": ["model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"]},
    "a regex": {"target_modules": r".*\.[13]\.(self_attn|mlp)\.(q|gate)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "exclude by name": {"target_modules": "all-linear", "exclude_modules": ["o_proj", "1.mlp.up_proj"]},
    "exclude by regex": {"target_modules": ["q_proj"], "exclude_modules": r".*\.2\..*"},
    "layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
    "layers under a pattern": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [1],
        "layers_pattern": ["layers"],
    },
    "alpha over rank": {"r": 3, "lora_alpha": 7},
    "rslora": {"use_rslora": True, "r": 5, "lora_alpha": 6},
    "rank and alpha patterns": {
        "target_modules": ["q_proj", "k_proj", "v_proj"],
        "rank_pattern": {r"1\.self_attn\.q_proj": 2, "k_proj": 16},
        "alpha_pattern": {"q_proj": 1, r"layers\.[02]\..*\.v_proj": 64},
        "use_rslora": True,
    },
    "dora": {"use_dora": True, "target_modules": ["q_proj", "down_proj"]},
    "dora and rslora": {"use_dora": True, "use_rslora": True, "rank_pattern": {"v_proj": 3}},
    "lora_bias": {"lora_bias": True, "target_modules": ["q_proj", "up_proj"]},
    "bias of all": {"bias": "all"},
    "bias of the adapted": {"bias": "lora_only", "target_modules": ["o_proj", "gate_proj"]},
    "lora_bias and bias of all": {"lora_bias": True, "bias": "all"},
    "dora and bias of all": {"use_dora": True, "bias": "all"},
    "modules in full": {"modules_to_save": ["mlp", "lm_head"]},
    "norms in full": {"modules_to_save": ["norm", "input_layernorm"]},
    "the embedding in full": {"modules_to_save": ["embed_tokens"]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "no initialisation": {"init_lora_weights": False},
    "dropout": {"lora_dropout": 0.3},
    "dora and dropout": {"lora_dropout": 0.3, "use_dora": True},
    "the embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "the head": {"target_modules": ["lm_head", "q_proj"]},
    "embedding and head by regex": {"target_modules": r".*(embed_tokens|lm_head)", "use_rslora": True},
    "patterns that match nothing": {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"nothing": 1}},
    "rows of the embedding": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 200, 7]},
    "rows of both ends": {"trainable_token_indices": {"lm_head": [9, 4], "embed_tokens": [250]}},
    "a task type": {"task_type": "CAUSAL_LM"},
}
# Not options that PEFT's config can hold twice: a list's order, and where PEFT expands a shorthand.
UNORDERED = ("target_modules", "exclude_modules", "modules_to_save")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    changes = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}
    return make_base("llama", tmp_path_factory.mktemp("base"), **changes)


@pytest.fixture(scope="module")
def plain(base):
    return logits_torch(load_torch(base))


def config_of(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    return {key: sorted(v) if key in UNORDERED and isinstance(v, list) else v for key, v in config.items()}


FEW = (
    "a regex", "all-linear", "exclude by name", "layers under a pattern", "rank and alpha patterns",
    "dora and rslora", "lora_bias and bias of all", "bias of the adapted", "dora and bias of all", "modules in full",
    "norms in full", "no initialisation", "the embedding", "embedding and head by regex", "rows of both ends",
)  # fmt: skip


@pytest.mark.parametrize("name", sampled(OPTIONS, *FEW))
def test_out_to_peft(base, plain, tmp_path, name):
    loaded = load_mlx(base)
    export_adapter(adapt_mlx(loaded, {"r": 4, **OPTIONS[name]}), tmp_path / "ours")
    ours = logits_mlx(loaded.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # PEFT only warns about keys it does not find.
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        theirs = peft.PeftModel.from_pretrained(load_torch(base), tmp_path / "ours").eval()
    expected = logits_torch(theirs)
    assert distance(ours, expected) <= CLOSE
    assert distance(plain, expected) > 1e-3
    with quiet():
        theirs.save_pretrained(tmp_path / "theirs")
    ours_keys = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    their_keys = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert {k: v.shape for k, v in ours_keys.items()} == {k: v.shape for k, v in their_keys.items()}
    assert config_of(tmp_path / "ours") == config_of(tmp_path / "theirs")


@pytest.mark.parametrize("name", sampled(OPTIONS, *FEW))
def test_in_from_peft_and_out_again(base, plain, tmp_path, name):
    theirs = adapt_torch(load_torch(base), {"r": 4, **OPTIONS[name]})
    expected = logits_torch(theirs)
    with quiet():
        theirs.save_pretrained(tmp_path / "theirs")
    loaded = load_mlx(base)
    adapter = read_adapter(tmp_path / "theirs", loaded)
    assert distance(logits_mlx(loaded.model), expected) <= CLOSE
    assert distance(plain, expected) > 1e-3
    export_adapter(adapter, tmp_path / "ours")
    before = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    after = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert set(after) == set(before)
    assert all(np.array_equal(after[key], before[key]) for key in before)


def test_a_string_for_modules_to_save_means_its_letters_as_in_peft(base, tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save="dw")
    model = load_torch(base)
    with quiet():
        transformers.set_seed(SEED)
        theirs = peft.get_peft_model(model, config)
    loaded = load_mlx(base)
    adapter = attach(loaded, resolve_lora(config), seed=SEED)
    start = trained_by_peft(theirs)
    assert [adapter.hf_name(name) for name in adapter.trainable()] == list(start)
    assert "base_model.model.lm_head.weight" in start
    for name, value in adapter.trainable().items():
        np.testing.assert_allclose(value, start[adapter.hf_name(name)], rtol=0, atol=1e-7, err_msg=name)
    export_adapter(adapter, tmp_path / "ours")
    loads = peft.PeftModel.from_pretrained(load_torch(base), tmp_path / "ours")
    assert distance(logits_mlx(loaded.model), logits_torch(loads)) <= CLOSE


def test_overlapping_patterns_keep_their_meaning_although_peft_sorts_them(base, tmp_path):
    settings = {"target_modules": ["q_proj", "k_proj"], "alpha_pattern": {"q_proj": 1, r"layers\.[02]\..*": 64}}
    loaded = load_mlx(base)
    export_adapter(adapt_mlx(loaded, {"r": 4, **settings}), tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(load_torch(base), tmp_path / "ours").eval()
    assert distance(logits_mlx(loaded.model), logits_torch(theirs)) <= CLOSE


MERGED = [
    "all-linear",
    "rank and alpha patterns",
    "dora",
    "lora_bias",
    "bias of all",
    "modules in full",
    "the embedding",
]


@pytest.mark.parametrize("name", MERGED)
def test_merging_gives_what_merge_and_unload_gives(base, tmp_path, name):
    loaded = load_mlx(base)
    adapter = adapt_mlx(loaded, {"r": 4, **OPTIONS[name]})
    export_adapter(adapter, tmp_path / "adapter")
    merge_adapter(adapter, tmp_path / "merged")
    with quiet():
        theirs = peft.PeftModel.from_pretrained(load_torch(base), tmp_path / "adapter").merge_and_unload().eval()
        theirs.save_pretrained(tmp_path / "theirs")
    assert distance(logits_mlx(loaded.model), logits_torch(load_torch(tmp_path / "merged"))) <= CLOSE
    assert distance(logits_mlx(load_mlx(tmp_path / "theirs").model), logits_mlx(loaded.model)) <= CLOSE
    ours = load_file(tmp_path / "merged" / "model.safetensors")
    expected = load_file(tmp_path / "theirs" / "model.safetensors")
    assert set(ours) == set(expected)
    # fp32 sums of four terms.
    assert max(np.abs(ours[key] - expected[key]).max() for key in ours) <= 1e-6


@pytest.mark.parametrize("rope_type", ["llama3", "yarn", "longrope"])
def test_a_base_that_keeps_its_rotary_frequencies_merges(rope_type, tmp_path):
    """They are arrays of the model and no parameters."""
    rope = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
    rope |= {
        "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "yarn": {},
        "longrope": {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
    }[rope_type]
    family = "phi3" if rope_type == "longrope" else "llama"
    folder = tiny_model(family, tmp_path / "base", rope_parameters=rope)
    loaded = load_mlx(folder)
    adapter = adapt_mlx(loaded, {"r": 4, "target_modules": "all-linear"})
    merge_adapter(adapter, tmp_path / "merged")
    assert distance(logits_mlx(loaded.model), logits_torch(load_torch(tmp_path / "merged"))) <= CLOSE
