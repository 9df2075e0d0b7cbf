"""Full fine-tunes: trl's curve, and a saved folder that transformers loads with the same logits and every part."""

from __future__ import annotations

import json
import warnings

import mlx.core as mx
import numpy as np
import pytest
import torch
from architecture_checks import read_tensors, relative
from architecture_zoo import make_ids
from safetensors.torch import load_file
from training_checks import compare_full, load_class, make_base, quiet, train_mlx

from hf_mlx.errors import HFMLXError, ModelError
from hf_mlx.models.load import load_model
from hf_mlx.models.save import write_model
from hf_mlx.settings.plan import ModelPlan

pytestmark = pytest.mark.usefixtures("uncompiled")

# fp32 on both sides; two Adam steps turn a rounding difference in a gradient near zero into one of the weight.
CURVE = 1e-4
# One forward pass over the same saved weights: another order of summation.
LOGITS = 1e-5

# Tied and untied heads, fused layers, stacked and split experts, state-space and convolution layers, vision towers.
FAMILIES = {
    "llama": {"tie_word_embeddings": False},
    "llama, tied": {"tie_word_embeddings": True},
    "qwen2": {"tie_word_embeddings": True},
    "mistral": {},
    "phi3": {},
    "gemma3_text": {},
    "gemma3": {},
    "gpt2": {},
    "gpt_neox": {},
    "qwen3_moe": {},
    "mixtral": {},
    "granitemoe": {},
    "deepseek_v3": {},
    "mamba": {},
    "lfm2": {},
    "apertus": {},
    "qwen3_5": {},
    "nemotron_h": {},
    "laguna": {},
}
SAMPLE = ("llama, tied", "gemma3", "gpt2", "qwen3_moe", "lfm2")


@pytest.mark.parametrize("name", [n if n in SAMPLE else pytest.param(n, marks=pytest.mark.wide) for n in FAMILIES])
def test_a_full_fine_tune_is_trls_and_loads_in_transformers(name, tmp_path):
    loss, grad_norm, trainer = compare_full(name.split(",")[0], tmp_path, **FAMILIES[name])

    assert loss < CURVE
    assert grad_norm < CURVE
    saved, base = read_tensors(tmp_path / "ours"), read_tensors(tmp_path / "base")
    assert saved.keys() == base.keys()
    assert all(saved[key].shape == base[key].shape for key in base)
    changed = [key for key in base if not torch.equal(saved[key], base[key])]
    assert len(changed) > len(base) // 4
    assert not [key for key in changed if any(part in key for part in ("vision", "visual", "multi_modal"))]
    model = trainer.session.loaded.model
    model.eval()
    assert relative(np.array(model(mx.array(make_ids().numpy()))), _torch_logits(tmp_path / "ours")) < LOGITS


def test_a_checkpoint_with_a_vision_tower_is_whole_and_resumes(tmp_path):
    base = make_base("gemma3", tmp_path / "base")
    settings = {"save_strategy": "steps", "save_steps": 1}
    train_mlx(base, tmp_path / "straight", None, settings=settings)
    halfway = tmp_path / "straight" / "run" / "checkpoint-1"
    assert load_file(halfway / "model.safetensors").keys() == read_tensors(base).keys()
    assert _torch_logits(halfway).shape[-1] == 320

    train_mlx(base, tmp_path / "resumed", None, resume=str(halfway))

    ends = [read_tensors(tmp_path / name) for name in ("straight", "resumed")]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_a_model_saved_over_its_own_base_is_whole(tmp_path):
    base = make_base("qwen3_moe", tmp_path / "base")
    loaded = load_model(base, ModelPlan())
    expected = np.array(loaded.model(mx.array(make_ids().numpy())))

    write_model(loaded, base)

    assert relative(expected, _torch_logits(base)) < LOGITS


def test_a_conversion_without_its_vision_part_is_not_saved_as_a_whole_model(tmp_path):
    base = make_base("gemma3", tmp_path / "base")
    _convert(base, tmp_path / "mlx")
    with quiet():
        loaded = load_model(tmp_path / "mlx", ModelPlan())

    with pytest.raises(ModelError, match="vision_config") as refused:
        write_model(loaded, tmp_path / "saved")

    assert "adapter" in refused.value.remedy
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("bits", [4, 8])
def test_all_weights_of_a_quantised_base_cannot_be_trained(bits, tmp_path):
    base = make_base("llama", tmp_path / "base")
    _convert(base, tmp_path / "mlx", q_bits=bits)

    with pytest.raises(HFMLXError, match="quantised") as refused:
        train_mlx(tmp_path / "mlx", tmp_path / "ours", None)

    assert "peft_config=LoraConfig(" in refused.value.remedy


def test_all_weights_cannot_be_trained_in_4_bits_on_request(tmp_path):
    base = make_base("llama", tmp_path / "base")

    with pytest.raises(HFMLXError, match="quantised") as refused:
        train_mlx(base, tmp_path / "ours", None, quantization_config={"load_in_4bit": True})

    assert "peft_config=LoraConfig(" in refused.value.remedy


def _torch_logits(folder) -> np.ndarray:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model, report = load_class(folder).from_pretrained(folder, output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["mismatched_keys"]
        return model.eval()(make_ids(), use_cache=False).logits.numpy()


def _convert(base, folder, q_bits=None) -> None:
    """What ``mlx_lm.convert`` writes, for a model this library has loaded."""
    import mlx.nn as nn
    from mlx_lm.utils import save
    from transformers import AutoTokenizer

    with quiet():
        loaded = load_model(base, ModelPlan())
        config = json.loads((base / "config.json").read_text())
        if q_bits:
            nn.quantize(loaded.model, group_size=32, bits=q_bits)
            config["quantization"] = config["quantization_config"] = {"group_size": 32, "bits": q_bits}
        save(folder, base, loaded.model, AutoTokenizer.from_pretrained(base), config)
