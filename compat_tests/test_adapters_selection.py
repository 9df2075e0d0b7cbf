"""Which modules "all-linear", names and regexes mean, beside PEFT on the torch class of every verified model type."""

from __future__ import annotations

import re
from typing import Any

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
from peft.tuners.lora import LoraLayer
from training_checks import adapter_keys, compare_training

from hf_mlx.adapters.blueprint import draw_blueprint
from hf_mlx.adapters.defaults import REWRITTEN_NAMES
from hf_mlx.adapters.read import read_adapter
from hf_mlx.errors import AdapterError
from hf_mlx.models.architectures import VERIFIED
from hf_mlx.settings.plan import LoraPlan

pytestmark = pytest.mark.usefixtures("uncompiled")

# Where PEFT adapts parameters, a router that stands alone is one of them.
LINEAR_ROUTERS = ("afmoe", "mellum", "minimax_m2", "mixtral", "olmoe", "qwen3_moe", "qwen3_next")
SAMPLE = ("llama", "gemma4", "mixtral", "qwen3_moe", "deepseek_v3", "longcat_flash", "kimi_linear", "llama4_text")


def cases(names) -> list:
    return [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.wide) for name in sorted(names)]


def ours(base, settings) -> set[str]:
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    plan = LoraPlan(r=2, **values)
    targets = draw_blueprint(load_mlx(base), plan).wrapped
    stacks = {t.hf_path: "{}[{}]".format(*t.hf_path.rsplit(".", 1)) for t in targets if t.kind == "experts"}
    return {stacks.get(target.hf_path, target.hf_path) for target in targets}


def theirs(base, settings) -> set[str]:
    """Paths of the layers that PEFT put in, parameters marked."""
    with quiet():
        adapted: Any = peft.get_peft_model(load_torch(base), peft.LoraConfig(r=2, **settings))
    layers = [(n, m) for n, m in adapted.base_model.model.named_modules() if isinstance(m, LoraLayer)]
    names = [(n.replace(".base_layer", ""), getattr(m, "parameter_name", None)) for n, m in layers]
    # A router's parameter has the keys that a module of its path would have.
    return {n if p in (None, "weight") else f"{n}[{p}]" for n, p in names}


def corrected(settings, error: AdapterError) -> dict:
    """The settings after the remedy's line."""
    line = re.search(r"LoraConfig\((?:\.\.\., )?(.*)\)", error.remedy)
    assert line, error.remedy
    return {**settings, **eval(f"dict({line[1]})")}


@pytest.mark.parametrize("model_type", cases(VERIFIED))
def test_all_linear_is_pefts_or_refused_with_a_line_that_is(model_type, tmp_path):
    base, settings = make_base(model_type, tmp_path), {"target_modules": "all-linear"}
    try:
        chosen = ours(base, settings)
    except AdapterError as refused:
        settings = corrected(settings, refused)
        chosen = ours(base, settings)
    assert len(chosen) >= 4
    assert chosen == theirs(base, settings)


# One pattern reduces to names that stand in every layer, one reaches the router, and a list mixes both.
REACHING = {
    "a regex on one layer": r".*layers\.1\.self_attn\.(q|v)_proj",
    "a regex on the router": r".*layers\.0\..*\.(o_proj|gate)",
    "a regex on the attention": r"model\.layers\.\d+\.self_attn\.[qo]_proj",
    "a list with the router": ["q_proj", "gate"],
    "a list with its path": ["o_proj", "mlp.gate"],
}


@pytest.mark.parametrize("name", REACHING)
@pytest.mark.parametrize("model_type", cases(set(LINEAR_ROUTERS) - {"afmoe", "qwen3_next"}))
def test_names_and_regexes_are_pefts(model_type, name, tmp_path):
    base, settings = make_base(model_type, tmp_path), {"target_modules": REACHING[name]}
    chosen = ours(base, settings)
    assert len(chosen) >= 4
    assert chosen == theirs(base, settings)


# What reaches experts: both halves of a fused pair or none, by name, by path or by a pattern.
EXPERTS = {
    "a regex on the experts": r".*experts\.(gate|up|down)_proj",
    "a regex on all of that name": r".*\.(q|gate|up|down)_proj",
    "the second half": ["q_proj", "down_proj"],
    "by path": ["o_proj", "experts.gate_proj", "experts.up_proj"],
    "with the router": ["gate", "gate_proj", "up_proj", "down_proj"],
}


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("model_type", cases(("qwen3_moe", "deepseek_v3", "longcat_flash", "glm4_moe", "dots1")))
def test_experts_by_name_are_pefts(model_type, name, tmp_path):
    base, settings = make_base(model_type, tmp_path), {"target_modules": EXPERTS[name]}
    chosen = ours(base, settings)
    assert any(path.endswith("experts[down_proj]") or path.endswith("experts[gate_up_proj]") for path in chosen)
    assert chosen == theirs(base, settings)


PLAIN = ("gpt_oss", "granitemoe", "nemotron_h", "qwen3_moe", "mixtral")
_STACKS = """
    afmoe deepseek_v2 deepseek_v3 dots1 ernie4_5_moe exaone_moe glm4_moe glm4_moe_lite gpt_oss granitemoe jamba
    kimi_linear laguna lfm2_moe mellum mimo_v2_flash minimax_m2 mixtral nemotron_h olmoe qwen2_moe
    qwen3_5_moe_text qwen3_moe qwen3_next solar_open granitemoehybrid
"""
STACKS = _STACKS.split()


@pytest.mark.parametrize("model_type", [pytest.param(t, marks=() if t in PLAIN else pytest.mark.wide) for t in STACKS])
def test_target_parameters_are_pefts(model_type, tmp_path):
    first = "up_proj" if model_type == "nemotron_h" else "gate_up_proj"
    router = "router" if model_type in ("gpt_oss", "granitemoe", "granitemoehybrid", "jamba") else "gate"
    base = make_base(model_type, tmp_path)
    parameters = [f"experts.{first}", "experts.down_proj", f"{router}.weight"]
    settings = {"r": 3, "target_modules": ["q_proj"], "target_parameters": parameters}
    adapter = adapt_mlx(load_mlx(base), settings, moved=False)
    start = {adapter.hf_name(name): np.array(value) for name, value in adapter.trainable().items()}
    expected = trained_by_peft(adapt_torch(load_torch(base), settings, moved=False))
    assert list(start) == list(expected)
    assert all(np.array_equal(start[key], expected[key]) for key in expected)
    assert sum(".experts." in key for key in start) >= 4
    # And the other way: what PEFT made of it computes the same here.
    adapted = adapt_torch(load_torch(base), settings)
    with quiet():
        adapted.save_pretrained(tmp_path / "adapter")
    loaded = load_mlx(base)
    read_adapter(tmp_path / "adapter", loaded)
    assert distance(logits_mlx(loaded.model), logits_torch(adapted)) <= CLOSE


@pytest.mark.parametrize("name", ["gate_proj", "up_proj"])
def test_half_of_a_fused_pair_is_refused_as_in_peft(name, tmp_path):
    base, settings = make_base("qwen3_moe", tmp_path), {"target_modules": ["o_proj", name]}
    with pytest.raises(ValueError, match="fused"):
        theirs(base, settings)
    with pytest.raises(AdapterError, match="one matrix"):
        ours(base, settings)


def test_stacks_that_peft_reads_the_wrong_way_round_are_refused(tmp_path):
    base = make_base("llama4_text", tmp_path)
    with pytest.raises(AdapterError, match="right way") as refused:
        ours(base, {"target_modules": [], "target_parameters": ["experts.gate_up_proj"]})
    assert len(ours(base, corrected({}, refused.value))) >= 8


@pytest.mark.parametrize("names", [None, ["query"], []])
def test_the_line_for_a_list_that_means_nothing_holds(names, tmp_path):
    base, settings = make_base("olmoe", tmp_path), {"target_modules": names}
    with pytest.raises(AdapterError) as refused:
        ours(base, settings)
    settings = corrected(settings, refused.value)
    assert len(ours(base, settings)) == 16
    assert ours(base, settings) == theirs(base, settings)


@pytest.mark.parametrize("setting", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}])
def test_settings_that_peft_refuses_on_a_router_are_refused(setting, tmp_path):
    base, settings = make_base("mixtral", tmp_path), {"target_modules": ["q_proj", "gate"], **setting}
    with pytest.raises(ValueError, match="lora"):
        theirs(base, settings)
    with pytest.raises(AdapterError, match="as parameters"):
        ours(base, settings)


@pytest.mark.parametrize("model_type", cases(LINEAR_ROUTERS))
def test_a_router_trains_as_in_peft(model_type, tmp_path, monkeypatch):
    import training_checks

    lora = {"r": 4, "target_modules": ["q_proj", "o_proj", "gate"]}
    monkeypatch.setattr(training_checks, "lora_for", lambda model_type: lora)
    result = compare_training(model_type, tmp_path)
    assert result.other_keys == ()
    assert any(".gate." in key for key in adapter_keys(tmp_path / "ours"))
    assert max(result.loss, result.grad_norm, result.evaluation) < 1e-4
    assert result.moved > 1e-4


def test_every_type_is_looked_at():
    assert len(VERIFIED) >= 77
    assert len(REWRITTEN_NAMES.keys() & VERIFIED.keys()) == 18
    assert len(STACKS) == 26
    assert {*LINEAR_ROUTERS, *SAMPLE} <= set(VERIFIED)
