"""What an exported adapter folder holds, and how it comes to be."""

import json
import os

import mlx.core as mx
import numpy as np
import pytest
from adapter_folders import logits, make_llama, trained
from safetensors import safe_open

from hf_mlx import export_adapter
from hf_mlx.adapters.export import write_adapter
from hf_mlx.adapters.read import read_adapter
from hf_mlx.errors import AdapterError
from hf_mlx.models.load import load_model
from hf_mlx.settings.plan import LoraPlan, ModelPlan

P = "base_model.model.model.layers"


@pytest.fixture
def base(tmp_path):
    return make_llama(tmp_path / "base")


def stored(folder):
    with safe_open(folder / "adapter_model.safetensors", framework="numpy") as file:
        return {key: file.get_tensor(key) for key in list(file.keys())}, file.metadata()


def test_keys_shapes_and_metadata_are_pefts(base, tmp_path):
    _, adapter = trained(base, LoraPlan(r=4, target_modules=("v_proj", "down_proj")))
    export_adapter(adapter, tmp_path / "out")
    tensors, metadata = stored(tmp_path / "out")
    assert metadata == {"format": "pt"}
    expected = {}
    for i in range(2):
        expected |= {
            f"{P}.{i}.self_attn.v_proj.lora_A.weight": (4, 64),
            f"{P}.{i}.self_attn.v_proj.lora_B.weight": (32, 4),
        }
        expected |= {f"{P}.{i}.mlp.down_proj.lora_A.weight": (4, 96), f"{P}.{i}.mlp.down_proj.lora_B.weight": (64, 4)}
    assert {key: value.shape for key, value in tensors.items()} == expected
    assert {value.dtype for value in tensors.values()} == {np.dtype("float32")}
    name = "model.layers.1.mlp.down_proj.lora_A"
    assert np.array_equal(tensors[f"{P}.1.mlp.down_proj.lora_A.weight"], np.array(adapter.trainable()[name]))


def test_the_config_says_what_was_trained(base, tmp_path):
    plan = LoraPlan(r=4, lora_alpha=16, lora_dropout=0.1, target_modules=("q_proj",), task_type="CAUSAL_LM")
    loaded, adapter = trained(base, plan)
    write_adapter(adapter, loaded, tmp_path / "out", revision="abc")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    chosen = {
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "task_type",
        "inference_mode",
        "revision",
        "peft_type",
    }
    assert {key: config[key] for key in chosen} == {
        "r": 4,
        "lora_alpha": 16,
        "lora_dropout": 0.1,
        "target_modules": ["q_proj"],
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "revision": "abc",
        "peft_type": "LORA",
    }
    assert config["base_model_name_or_path"] == str(base)


def test_the_card_and_foreign_files_are_left_alone(base, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("mine")
    (out / "optimizer.pt").write_text("state")
    _, adapter = trained(base, LoraPlan())
    export_adapter(adapter, out)
    assert (out / "README.md").read_text() == "mine"
    assert sorted(os.listdir(out)) == ["README.md", "adapter_config.json", "adapter_model.safetensors", "optimizer.pt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


def test_a_nan_is_refused_before_anything_is_written(base, tmp_path):
    loaded, adapter = trained(base, LoraPlan())
    layer = loaded.model.model.layers[0].self_attn.q_proj
    layer.lora_B = layer.lora_B * float("nan")
    with pytest.raises(AdapterError, match=r"q_proj\.lora_B\.weight holds NaN"):
        export_adapter(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_trained_parameter_that_peft_would_not_load_is_refused(base, tmp_path):
    loaded, adapter = trained(base, LoraPlan())
    loaded.model.model.norm.unfreeze()
    with pytest.raises(AdapterError, match=r"model\.norm\.weight"):
        export_adapter(adapter, tmp_path / "out")


def test_writing_over_the_source_keeps_the_values(base, tmp_path):
    loaded, adapter = trained(base, LoraPlan())
    export_adapter(adapter, tmp_path / "out")
    again = load_model(base, ModelPlan())
    export_adapter(read_adapter(tmp_path / "out", again), tmp_path / "out")
    third = load_model(base, ModelPlan())
    read_adapter(tmp_path / "out", third)
    assert np.array_equal(logits(third), logits(loaded))


def test_a_failed_write_leaves_the_old_adapter(base, tmp_path, monkeypatch):
    _, adapter = trained(base, LoraPlan())
    export_adapter(adapter, tmp_path / "out")
    before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()

    def full_disk(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(mx, "save_safetensors", full_disk)
    with pytest.raises(AdapterError, match="out cannot be written: No space"):
        export_adapter(adapter, tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


def test_without_an_adapter_there_is_nothing_to_export(base, tmp_path):
    with pytest.raises(AdapterError, match="without an adapter"):
        export_adapter(load_model(base, ModelPlan()), tmp_path / "out")


def test_a_folder_that_cannot_be_made_is_named(base, tmp_path):
    (tmp_path / "file").write_text("")
    _, adapter = trained(base, LoraPlan())
    with pytest.raises(AdapterError, match="file/out"):
        export_adapter(adapter, tmp_path / "file" / "out")


@pytest.mark.parametrize(
    ("card", "recorded"),
    [
        ("---\nbase_model: acme/tiny\n---\n", "acme/tiny"),
        ("---\nlicense: mit\nbase_model:\n- acme/tiny\n---\n", "acme/tiny"),
        ("---\nbase_model: mlx-community/tiny-4bit\n---\n", None),
        ("no front matter", None),
    ],
)
def test_a_base_quantised_for_mlx_stands_for_its_original(base, tmp_path, card, recorded):
    loaded, adapter = trained(base, LoraPlan())
    loaded.config["quantization"] = {"bits": 4, "group_size": 64}
    (base / "README.md").write_text(card)
    if recorded is None:
        with pytest.raises(AdapterError, match="base="):
            export_adapter(adapter, tmp_path / "out")
        export_adapter(adapter, tmp_path / "out", base="acme/other")
    else:
        export_adapter(adapter, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == (recorded or "acme/other")


def test_a_snapshot_of_the_hub_cache_stands_for_its_repository(tmp_path):
    folder = tmp_path / "models--acme--tiny" / "snapshots" / ("0" * 40)
    _, adapter = trained(make_llama(folder), LoraPlan())
    export_adapter(adapter, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "acme/tiny"
