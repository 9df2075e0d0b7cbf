"""The start PEFT would make, without torch: same targets, same order, same numbers; and PEFT's tables."""

import numpy as np
import pytest
from adapter_pairs import adapt_mlx, adapt_torch, load_mlx, load_torch, make_base, trained_by_peft
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.transformers_weight_conversion import _MODEL_TO_CONVERSION_PATTERN, _MOE_TARGET_MODULE_MAPPING
from sampling import sampled

from hf_mlx.adapters.defaults import EXPERT_NAMES, TARGET_MODULES
from hf_mlx.models.architectures import VERIFIED

_FAMILIES = """
    llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi phi3 olmo2 smollm3 granite cohere starcoder2 stablelm glm
    glm4 exaone4 helium ernie4_5 nemotron gpt_neox gpt_bigcode gptj apertus qwen2_moe gemma4_text lfm2 qwen3_moe mixtral
    deepseek_v3 gpt_oss gemma3 qwen3_5 jamba longcat_flash nanochat falcon opt mistral4 qwen2_vl qwen3_vl_moe llava
"""
FAMILIES = _FAMILIES.split()

STARTS = {
    "lora": {"r": 4, "target_modules": "all-linear"},
    "no initialisation, lora_bias": {"r": 3, "lora_bias": True, "init_lora_weights": False},
    "patterns": {"r": 4, "target_modules": ["q_proj", "o_proj"], "rank_pattern": {"o_proj": 2}},
    "bias and modules": {
        "r": 2,
        "bias": "all",
        "modules_to_save": ["lm_head"],
        "target_modules": ["v_proj", "up_proj"],
    },
}
# Normals come from log, sin and cos, which numpy and torch round differently: 4 ulp of values up to 5.
NORMALS = {
    "gaussian": {"r": 4, "init_lora_weights": "gaussian", "target_modules": "all-linear"},
    "the embedding": {"r": 4, "target_modules": ["embed_tokens", "q_proj", "lm_head"]},
    "dora": {"r": 4, "use_dora": True},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base("llama", tmp_path_factory.mktemp("base"), attention_bias=True, tie_word_embeddings=False)


def both_starts(folder, settings):
    adapter = adapt_mlx(load_mlx(folder), settings, moved=False)
    ours = {adapter.hf_name(name): np.array(value) for name, value in adapter.trainable().items()}
    theirs = trained_by_peft(adapt_torch(load_torch(folder), settings, moved=False))
    # What no token reaches is drawn in its turn too, but trained nowhere: the adapter keeps it by itself.
    idle = {name: np.array(value) for name, value in adapter.idle.items()}
    assert list(idle) == [name for name in theirs if name in idle]
    assert list(ours) == [name for name in theirs if name not in idle]
    return ours | idle, theirs


@pytest.mark.parametrize("name", STARTS)
def test_the_start_is_pefts_bit_for_bit(base, name):
    ours, theirs = both_starts(base, STARTS[name])
    assert list(ours) == list(theirs)
    assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("name", NORMALS)
def test_normals_and_norms_are_pefts_to_the_last_bits(base, name):
    ours, theirs = both_starts(base, NORMALS[name])
    assert list(ours) == list(theirs)
    assert all(np.allclose(ours[key], theirs[key], rtol=1e-6, atol=2e-6) for key in theirs)


FEW = """
    llama qwen3 gemma3_text phi3 glm4 gpt_neox gpt_bigcode falcon opt qwen3_moe gpt_oss jamba lfm2 deepseek_v3
    gemma4_text qwen3_vl_moe
"""


@pytest.mark.parametrize("family", sampled(FAMILIES, *FEW.split()))
def test_every_family_has_torchs_module_order(family, tmp_path):
    settings = {"r": 2, "target_modules": "all-linear"}
    if family == "lfm2":
        settings["exclude_modules"] = r".*conv\.(in|out)_proj"
    ours, theirs = both_starts(make_base(family, tmp_path), settings)
    assert set(ours) == set(theirs)
    assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)
    assert len(ours) >= 8


def test_default_targets_are_pefts():
    theirs = {name: value if isinstance(value, str) else tuple(value) for name, value in _peft_defaults().items()}
    assert {name: theirs.get(name) for name in TARGET_MODULES} == TARGET_MODULES
    assert sorted(set(theirs) & set(VERIFIED) - set(TARGET_MODULES)) == []
    assert len(TARGET_MODULES) >= 17


def _peft_defaults():
    return TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING


def test_expert_names_are_pefts():
    expected = {}
    for model_type, pattern in _MODEL_TO_CONVERSION_PATTERN.items():
        names = _MOE_TARGET_MODULE_MAPPING.get(pattern)
        if names:
            expected[model_type] = {name for name in names if name != "gate"}
    assert {name: expected.get(name) for name in EXPERT_NAMES} == {k: set(v) for k, v in EXPERT_NAMES.items()}
    # longcat_flash counts experts that have no weights, which PEFT's fusing does not; experts are refused there.
    assert sorted(set(expected) & set(VERIFIED) - set(EXPERT_NAMES)) == ["longcat_flash"]
    assert len(EXPERT_NAMES) >= 20
