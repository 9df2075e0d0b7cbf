"""An adapter on all linear layers of every verified model type: out to PEFT, back in, the same logits; or a refusal."""

import warnings

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
)

from hf_mlx.adapters.defaults import EXPERT_NAMES
from hf_mlx.adapters.export import export_adapter
from hf_mlx.adapters.read import read_adapter
from hf_mlx.errors import AdapterError
from hf_mlx.models.architectures import VERIFIED

SAMPLE = ("llama", "qwen2", "mistral", "gemma3_text", "phi3", "gpt2", "qwen3_moe", "mixtral", "jamba")
# "all-linear" reaches a module that cannot carry an adapter; leaving it out, the rest can.
EXCLUDED = {
    "falcon_mamba": ["out_proj", "dt_proj"],
    "gemma3": r".*(vision_tower|multi_modal).*",
    "gemma4": r".*vision.*",
    "jamba": ["dt_proj"],
    "laguna": r".*shared_experts.*",  # which PEFT does not find again
    "llama4": r".*(vision_model|multi_modal_projector|router).*",
    "llama4_text": ["router"],  # wrapped by PEFT, its forward fails
    "mamba": ["out_proj", "dt_proj"],
    "mamba2": ["out_proj"],
    "nemotron_h": ["out_proj"],
    "qwen3_5": r".*visual.*",
    "qwen3_5_moe": r".*visual.*",
}
# MLX splits a projection or routes by a class of its own: only named targets there.
_ATTENTION = ["o_proj", "q_b_proj", "q_proj"]
_NAMED_TYPES = """
    deepseek_v2 deepseek_v3 deepseek_v32 dots1 exaone_moe glm4_moe glm4_moe_lite glm_moe_dsa kimi_linear longcat_flash
    solar_open
"""
# Where PEFT adapts experts and routers as parameters "all-linear" is refused; test_adapters_selection looks at that.
NAMED = {
    **{name: ["q_proj", "k_proj", "v_proj", "o_proj"] for name in EXPERT_NAMES.keys() & VERIFIED.keys()},
    **dict.fromkeys(_NAMED_TYPES.split(), _ATTENTION),
}


def settings_for(model_type):
    settings = {"r": 4, "target_modules": NAMED.get(model_type, "all-linear")}
    if model_type in EXCLUDED:
        settings["exclude_modules"] = EXCLUDED[model_type]
    return settings


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
def test_experts_out_to_peft_and_back(model_type, tmp_path):
    base = make_base(model_type, tmp_path / "base")
    loaded = load_mlx(base)
    adapter = adapt_mlx(loaded, {"r": 4, "target_modules": ["o_proj", *EXPERT_NAMES[model_type]]})
    experts = [target for target in adapter.targets if target.kind == "experts"]
    assert len(experts) >= 6
    export_adapter(adapter, tmp_path / "adapter")
    ours = logits_mlx(loaded.model)
    assert distance(ours, logits_torch(into_peft(base, tmp_path / "adapter"))) <= CLOSE
    again = load_mlx(base)
    read_adapter(tmp_path / "adapter", again)
    assert distance(logits_mlx(again.model), ours) == 0


EXPERT_REFUSALS = {
    "one half of a fused pair": {"target_modules": ["gate_proj", "down_proj"]},
    "dropout": {"lora_dropout": 0.1},
    "rslora, which PEFT scales by √2 for the pair": {"use_rslora": True},
    "dora": {"use_dora": True},
    "a rank pattern": {"rank_pattern": {"q_proj": 2}},
    "layers": {"layers_to_transform": [0]},
    "a regex": {"target_modules": r".*experts.*(gate|up|down)_proj"},
}


@pytest.mark.parametrize("name", EXPERT_REFUSALS)
def test_what_peft_cannot_express_for_experts_is_refused(name, tmp_path):
    targets = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    with pytest.raises(AdapterError, match=r"remedy: .*LoraConfig"):
        adapt_mlx(load_mlx(make_base("qwen3_moe", tmp_path)), {"target_modules": targets, **EXPERT_REFUSALS[name]})


def test_an_adapter_that_peft_trained_on_fused_experts_is_refused(tmp_path):
    base = make_base("qwen3_moe", tmp_path / "base")
    theirs = adapt_torch(load_torch(base), {"r": 4, "target_modules": ["gate_proj", "up_proj", "down_proj"]})
    with quiet():
        theirs.save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterError, match="target_parameters"):
        read_adapter(tmp_path / "adapter", load_mlx(base))


@pytest.mark.parametrize(
    ("model_type", "module"),
    [("mamba", "dt_proj"), ("gemma3", r"\(multi_modal_projector\|vision_tower\)")],
)
def test_modules_that_peft_would_miss_are_refused(model_type, module, tmp_path):
    loaded = load_mlx(make_base(model_type, tmp_path))
    targets = "all-linear" if model_type != "mamba" else ["dt_proj"]
    with pytest.raises(AdapterError, match=module):
        adapt_mlx(loaded, {"target_modules": targets})


def test_every_verified_type_is_accounted_for():
    assert len(VERIFIED) >= 60
    assert {*EXCLUDED, *NAMED} <= set(VERIFIED)
