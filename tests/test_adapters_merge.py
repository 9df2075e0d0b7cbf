"""Base and adapter folded into one model."""

import json

import numpy as np
import pytest
from adapter_folders import logits, make_llama, trained
from safetensors.numpy import load_file

from hf_mlx import export_adapter
from hf_mlx.adapters.merge import measure_survival, merge_adapter, merge_and_unload
from hf_mlx.cli.main import main
from hf_mlx.errors import AdapterError
from hf_mlx.models.load import load_model
from hf_mlx.settings.plan import LoraPlan, ModelPlan

# One fp32 matrix product in place of three.
CLOSE = 1e-5

PLANS = {
    "lora": LoraPlan(r=4, target_modules="all-linear"),
    "dora": LoraPlan(r=4, target_modules="all-linear", use_dora=True),
    "biases": LoraPlan(r=4, target_modules=("q_proj", "o_proj"), lora_bias=True, bias="all"),
    "embedding and head": LoraPlan(r=4, target_modules=("embed_tokens", "lm_head")),
    "modules_to_save": LoraPlan(r=4, modules_to_save=("mlp",)),
}


@pytest.fixture
def base(tmp_path):
    return make_llama(tmp_path / "base")


def distance(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


@pytest.mark.parametrize("name", PLANS)
def test_the_merged_folder_computes_the_same_under_the_same_names(base, tmp_path, name):
    loaded, adapter = trained(base, PLANS[name])
    merge_adapter(adapter, tmp_path / "merged")
    assert distance(logits(load_model(tmp_path / "merged", ModelPlan())), logits(loaded)) < CLOSE
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    assert {key: value.shape for key, value in after.items()} == {key: value.shape for key, value in before.items()}


@pytest.mark.parametrize("name", PLANS)
def test_merging_in_memory_leaves_a_plain_model(base, name):
    loaded, adapter = trained(base, PLANS[name])
    expected = logits(loaded)
    names = [path for path, _ in load_model(base, ModelPlan()).model.named_modules()]
    merge_and_unload(adapter)
    assert distance(logits(loaded), expected) < CLOSE
    assert sorted(path for path, _ in loaded.model.named_modules()) == sorted(names)


def test_a_lora_bias_without_a_bias_to_add_it_to_is_refused(base, tmp_path):
    _, adapter = trained(base, LoraPlan(r=4, target_modules=("up_proj",), lora_bias=True))
    with pytest.raises(AdapterError, match="whose base has no bias"):
        merge_adapter(adapter, tmp_path / "merged")


def test_the_base_is_never_overwritten(base):
    _, adapter = trained(base, LoraPlan())
    with pytest.raises(AdapterError, match="the base itself"):
        merge_adapter(adapter, base)


def test_a_quantised_base_is_only_written_in_floating_point_and_says_what_would_be_lost(base, tmp_path):
    loaded, adapter = trained(base, LoraPlan(r=4, lora_alpha=0.01), ModelPlan(quantization_bits=4))
    with pytest.raises(AdapterError, match=r"\d% of the adapter would survive.*\n.*\n.*--dequantize"):
        merge_adapter(adapter, tmp_path / "merged")
    merge_adapter(adapter, tmp_path / "merged", dequantize=True)
    assert "quantization" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert distance(logits(load_model(tmp_path / "merged", ModelPlan())), logits(loaded)) < CLOSE


def test_what_survives_quantisation_grows_with_the_delta(base):
    def survival(alpha):
        _, adapter = trained(base, LoraPlan(r=4, lora_alpha=alpha), ModelPlan(quantization_bits=8))
        kept = measure_survival(adapter)
        assert len(kept) == 4
        return min(kept.values())

    assert survival(1e-3) < 0.1 < 0.9 < survival(100)
    _, plain = trained(base, LoraPlan())
    assert measure_survival(plain) == {}


def test_in_memory_a_lost_delta_is_kept_by_dequantising_its_layer(base):
    loaded, adapter = trained(base, LoraPlan(r=4, lora_alpha=0.1), ModelPlan(quantization_bits=4))
    expected = logits(loaded)
    model = merge_and_unload(adapter)
    assert distance(logits(loaded), expected) < CLOSE
    kinds = {type(layer).__name__ for layer in (model.layers[0].self_attn.q_proj, model.layers[0].self_attn.k_proj)}
    assert kinds == {"Linear", "QuantizedLinear"}


def test_the_commands_export_and_merge(base, tmp_path, capsys):
    loaded, adapter = trained(base, LoraPlan(r=4))
    export_adapter(adapter, tmp_path / "adapter")
    assert main(["export", str(tmp_path / "adapter"), str(tmp_path / "clean"), "--base-name", "acme/tiny"]) == 0
    assert (
        json.loads((tmp_path / "clean" / "adapter_config.json").read_text())["base_model_name_or_path"] == "acme/tiny"
    )
    assert main(["merge", str(tmp_path / "clean"), str(tmp_path / "merged"), "--base", str(base)]) == 0
    assert distance(logits(load_model(tmp_path / "merged", ModelPlan())), logits(loaded)) < CLOSE
    assert "4 adapted modules of acme/tiny" in capsys.readouterr().out
    assert main(["merge", str(tmp_path / "nowhere"), str(tmp_path / "merged")]) == 2
    assert "no such folder" in capsys.readouterr().err
