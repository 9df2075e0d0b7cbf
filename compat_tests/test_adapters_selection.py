"""Which modules "all-linear", names and regexes mean, beside PEFT on the torch class of every verified model type."""

from __future__ import annotations

import re
from typing import Any

import peft
import pytest
from adapter_pairs import load_mlx, load_torch, make_base, quiet
from peft.tuners.lora import LoraLayer
from training_checks import adapter_keys, compare_training

from hf_mlx.adapters.blueprint import draw_blueprint
from hf_mlx.adapters.defaults import REWRITTEN_NAMES
from hf_mlx.errors import AdapterError
from hf_mlx.models.architectures import VERIFIED
from hf_mlx.settings.plan import LoraPlan

# Where PEFT adapts parameters, a router that stands alone is one of them.
LINEAR_ROUTERS = ("afmoe", "mellum", "minimax_m2", "mixtral", "olmoe", "qwen3_moe", "qwen3_next")
SAMPLE = ("llama", "gemma4", "mixtral", "qwen3_moe", "deepseek_v3", "longcat_flash", "kimi_linear", "llama4_text")


def cases(names) -> list:
    return [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.wide) for name in sorted(names)]


def ours(base, settings) -> set[str]:
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    plan = LoraPlan(r=2, **values)
    return {target.hf_path for target in draw_blueprint(load_mlx(base), plan).targets}


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


@pytest.mark.parametrize("model_type", cases(REWRITTEN_NAMES.keys() & VERIFIED.keys()))
def test_all_linear_is_refused_where_peft_adapts_parameters(model_type, tmp_path):
    base = make_base(model_type, tmp_path)
    assert any("[gate_up_proj]" in path for path in theirs(base, {"target_modules": "all-linear"}))
    with pytest.raises(AdapterError, match="as parameters"):
        ours(base, {"target_modules": "all-linear"})


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


@pytest.mark.parametrize("selector", [r".*experts\.(gate|up|down)_proj", r".*\.(q|gate|up|down)_proj"])
def test_a_regex_that_reaches_experts_is_refused(selector, tmp_path):
    base = make_base("qwen3_moe", tmp_path)
    with pytest.raises(AdapterError, match="all experts") as refused:
        ours(base, {"target_modules": selector})
    settings = corrected({"target_modules": selector}, refused.value)
    assert ours(base, settings) == theirs(base, settings)


@pytest.mark.parametrize(
    ("model_type", "names"),
    [("longcat_flash", ["o_proj", "gate_proj", "up_proj", "down_proj"]), ("deepseek_v3", ["o_proj", "gate"])],
)
def test_parameters_that_mlx_holds_otherwise_are_refused(model_type, names, tmp_path):
    base = make_base(model_type, tmp_path)
    assert len(theirs(base, {"target_modules": names})) > 4
    with pytest.raises(AdapterError, match="in another form") as refused:
        ours(base, {"target_modules": names})
    settings = corrected({"target_modules": names}, refused.value)
    assert ours(base, settings) == theirs(base, settings)


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
    with pytest.raises(AdapterError, match="router"):
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
    assert len(VERIFIED) >= 73
    assert len(REWRITTEN_NAMES.keys() & VERIFIED.keys()) == 17
    assert {*LINEAR_ROUTERS, *SAMPLE} <= set(VERIFIED)
