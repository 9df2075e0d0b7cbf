"""An adapter on all linear layers of every verified model type: out to PEFT, back in, the same logits; or a refusal."""

import json
import warnings

import numpy as np
import peft
import pytest
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
    quiet,
    trained_by_peft,
)
from safetensors.numpy import load_file, save_file
from training_checks import EXCLUDED

from hf_mlx.adapters.defaults import EXPERT_NAMES
from hf_mlx.adapters.export import export_adapter
from hf_mlx.adapters.read import read_adapter
from hf_mlx.adapters.sites import list_sites
from hf_mlx.errors import AdapterError
from hf_mlx.models.architectures import VERIFIED

pytestmark = pytest.mark.usefixtures("uncompiled")

SAMPLE = ("llama", "qwen2", "mistral", "gemma3_text", "phi3", "gpt2", "qwen3_moe", "mixtral", "jamba")


def settings_for(model_type):
    return {"r": 4, "target_modules": "all-linear"} | (
        {"exclude_modules": EXCLUDED[model_type]} if model_type in EXCLUDED else {}
    )


def cases(names):
    return [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.wide) for name in sorted(names)]


def into_peft(base, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        return peft.PeftModel.from_pretrained(load_torch(base), folder).eval()


@pytest.mark.parametrize("model_type", cases(VERIFIED))
def test_out_to_peft_and_back(model_type, tmp_path):
    base = make_base(model_type, tmp_path / "base")
    loaded = load_mlx(base)
    plain = logits_mlx(loaded.model)
    adapter = adapt_mlx(loaded, settings_for(model_type))
    export_adapter(adapter, tmp_path / "adapter")
    ours = logits_mlx(loaded.model)
    # kimi_linear's own logits differ from torch's by 1e-5 already.
    assert distance(ours, logits_torch(into_peft(base, tmp_path / "adapter"))) <= 10 * CLOSE
    again = load_mlx(base)
    read_adapter(tmp_path / "adapter", again)
    assert distance(logits_mlx(again.model), ours) == 0
    assert distance(plain, ours) > 1e-3
    assert len(adapter.targets) >= 4


@pytest.mark.parametrize("model_type", cases(VERIFIED))
def test_in_from_peft(model_type, tmp_path):
    base = make_base(model_type, tmp_path / "base")
    theirs = adapt_torch(load_torch(base), settings_for(model_type))
    with quiet():
        theirs.save_pretrained(tmp_path / "adapter")
    loaded = load_mlx(base)
    read_adapter(tmp_path / "adapter", loaded)
    assert distance(logits_mlx(loaded.model), logits_torch(theirs)) <= 10 * CLOSE


@pytest.mark.parametrize("model_type", cases(set(EXPERT_NAMES) & set(VERIFIED)))
def test_an_adapter_of_single_experts_means_what_peft_makes_of_it(model_type, tmp_path):
    """Files of transformers 4 hold a pair for each expert, which PEFT joins on loading."""
    base = make_base(model_type, tmp_path / "base")
    names, adapter = EXPERT_NAMES[model_type], tmp_path / "adapter"
    with quiet():
        adapt_torch(load_torch(base), {"r": 3, "target_modules": ["o_proj", *names]}).save_pretrained(adapter)
    held = load_file(adapter / "adapter_model.safetensors")
    apart = _apart(held, load_mlx(base), names)
    save_file(apart, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((adapter / "adapter_config.json").read_text())
    config |= {"target_modules": ["o_proj", *names], "target_parameters": None, "rank_pattern": {}, "alpha_pattern": {}}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    loaded = load_mlx(base)
    read_adapter(adapter, loaded)
    theirs = logits_torch(into_peft(base, adapter))
    assert distance(logits_mlx(loaded.model), theirs) <= 10 * CLOSE
    assert distance(theirs, logits_torch(load_torch(base))) > 1e-3
    assert len(apart) > len(held) + 12


def _apart(held, loaded, names):
    """Random pairs for each expert, under the keys that transformers 4 had."""
    rng = np.random.RandomState(0)
    apart = {key: value for key, value in held.items() if ".experts." not in key}
    for site in list_sites(loaded):
        if site.kind == "experts":
            for path, module in zip([site.mlx_path, *(path for path, _ in site.parts)], site.modules, strict=True):
                for stored in loaded.names.to_hf_names(f"{path}.weight"):
                    stem = f"base_model.model.{stored.removesuffix('.weight')}"
                    shapes = {"A": (3, module.input_dims), "B": (module.output_dims, 3)}
                    for ab, shape in shapes.items():
                        apart[f"{stem}.lora_{ab}.weight"] = rng.normal(size=shape, scale=0.05).astype(np.float32)
    return apart


EXPERT_REFUSALS = {
    "one half of a fused pair": {"target_modules": ["gate_proj", "down_proj"]},
    "dropout": {"lora_dropout": 0.1},
    "a bias": {"lora_bias": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
}


@pytest.mark.parametrize("name", EXPERT_REFUSALS)
def test_what_peft_cannot_express_for_experts_is_refused(name, tmp_path):
    base, settings = (
        make_base("qwen3_moe", tmp_path),
        {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]},
    )
    with pytest.raises((ValueError, AttributeError)):
        adapt_torch(load_torch(base), {**settings, **EXPERT_REFUSALS[name]})
    with pytest.raises(AdapterError, match=r"remedy: .*LoraConfig"):
        adapt_mlx(load_mlx(base), {**settings, **EXPERT_REFUSALS[name]})


# What PEFT reads per parameter, or on modules alone.
EXPERT_SETTINGS = {
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"down_proj": 2, "q_proj": 3}, "alpha_pattern": {r".*\.gate_up_proj": 5, "o_proj": 7}},
    "layers": {"layers_to_transform": [0]},
    "excluded": {"exclude_modules": ["o_proj", "down_proj"]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "random": {"init_lora_weights": False},
    "trained in full": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("name", EXPERT_SETTINGS)
def test_settings_mean_for_experts_what_they_mean_in_peft(name, tmp_path):
    base = make_base("qwen3_moe", tmp_path / "base", tie_word_embeddings=False)
    settings = {"r": 4, "target_modules": ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
    settings |= EXPERT_SETTINGS[name]
    adapter = adapt_mlx(load_mlx(base), settings, moved=False)
    start = {adapter.hf_name(key): np.array(value) for key, value in adapter.trainable().items()}
    expected = trained_by_peft(adapt_torch(load_torch(base), settings, moved=False))
    assert list(start) == list(expected)
    assert all(np.allclose(start[key], expected[key], rtol=1e-6, atol=2e-6) for key in expected)
    theirs = adapt_torch(load_torch(base), settings)
    with quiet():
        theirs.save_pretrained(tmp_path / "adapter")
    loaded = load_mlx(base)
    export_adapter(read_adapter(tmp_path / "adapter", loaded), tmp_path / "again")
    assert distance(logits_mlx(loaded.model), logits_torch(theirs)) <= CLOSE
    assert distance(logits_torch(into_peft(base, tmp_path / "again")), logits_torch(theirs)) <= CLOSE
