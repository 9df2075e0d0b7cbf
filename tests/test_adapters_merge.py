"""Base and adapter folded into one model."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest
from adapter_folders import logits, make_llama, trained
from safetensors.numpy import load_file

from hf_mlx import export_adapter
from hf_mlx.adapters.merge import measure_survival, merge_adapter, merge_and_unload
from hf_mlx.cli.main import main
from hf_mlx.errors import AdapterError
from hf_mlx.models.load import load_model
from hf_mlx.settings.plan import LoraPlan, ModelPlan, PrecisionPlan

# One fp32 matrix product in place of three.
CLOSE = 1e-5

PLANS = {
    "lora": LoraPlan(r=4, target_modules="all-linear"),
    "dora": LoraPlan(r=4, target_modules="all-linear", use_dora=True),
    "biases": LoraPlan(r=4, target_modules=("q_proj", "o_proj"), lora_bias=True, bias="all"),
    "embedding and head": LoraPlan(r=4, target_modules=("embed_tokens", "lm_head")),
    "rows": LoraPlan(r=4, trainable_token_indices={"embed_tokens": (5, 17), "lm_head": (3, 120)}),
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


def occupied(folder, base, name):
    """A folder of each kind that a merge must leave as it is, and the path to give."""
    if name == "the base":
        return base, base
    if name == "the adapter":
        return folder / "adapter", folder / "adapter"
    if name == "a link to the adapter":
        (folder / "link").symlink_to(folder / "adapter")
        return folder / "link", folder / "adapter"
    if name == "the folder around the base":
        return base.parent, base.parent
    held = folder / "held"
    held.mkdir()
    if name == "another model's leftovers":
        (held / "model-00001-of-00002.safetensors").write_bytes(b"x")
    elif name == "somebody's notes":
        (held / ".notes").write_text("mine")
    elif name == "a file":
        held.rmdir()
        held.write_text("mine")
    return held, held


OCCUPIED = [
    "the base",
    "the adapter",
    "a link to the adapter",
    "the folder around the base",
    "another model's leftovers",
    "somebody's notes",
    "a file",
]


def contents(path):
    return {p: p.read_bytes() for p in [path, *path.rglob("*")] if p.is_file()}


@pytest.mark.parametrize("name", OCCUPIED)
def test_merge_writes_over_nothing(base, tmp_path, capsys, name):
    _, adapter = trained(base, LoraPlan(r=4))
    export_adapter(adapter, tmp_path / "adapter", base=str(base))
    asked, held = occupied(tmp_path, base, name)
    before = contents(held)
    assert main(["merge", str(tmp_path / "adapter"), str(asked)]) == 2
    error = capsys.readouterr().err
    assert "which holds" in error or "the base itself" in error
    assert "remedy: another place" in error
    assert contents(held) == before


def test_merge_takes_an_empty_folder_and_a_link_to_one(base, tmp_path):
    loaded, adapter = trained(base, LoraPlan(r=4))
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    merge_adapter(adapter, tmp_path / "link")
    assert distance(logits(load_model(tmp_path / "empty", ModelPlan())), logits(loaded)) < CLOSE


def test_a_merge_that_dies_leaves_nothing_that_loads_and_the_next_tidies_it(base, tmp_path):
    loaded, adapter = trained(base, LoraPlan(r=4))
    export_adapter(adapter, tmp_path / "adapter", base=str(base))
    code = (
        "import os, sys, signal\n"
        "import hf_mlx.adapters.merge as merge\n"
        "write = merge.write_model\n"
        "merge.write_model = lambda *a: (write(*a), os.kill(os.getpid(), signal.SIGKILL))\n"
        "from hf_mlx.cli.main import main\n"
        "main(sys.argv[1:])\n"
    )
    words = ["merge", str(tmp_path / "adapter"), str(tmp_path / "out" / "merged")]
    died = subprocess.run([sys.executable, "-c", code, *words], check=False)
    assert died.returncode == -signal.SIGKILL
    left = [path.name for path in (tmp_path / "out").iterdir()]
    assert len(left) == 1 and left[0].startswith(".")
    assert main(words) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["merged"]
    assert distance(logits(load_model(tmp_path / "out" / "merged", ModelPlan())), logits(loaded)) < CLOSE


@pytest.mark.parametrize("into", ["folder", "memory"])
def test_a_merged_weight_that_is_not_finite_is_never_written(base, tmp_path, into):
    loaded, adapter = trained(base, LoraPlan(r=4), ModelPlan(precision=PrecisionPlan(dtype="float16")))
    layer = loaded.model.layers[1].self_attn.q_proj
    layer.lora_B = layer.lora_B * 1e30
    with pytest.raises(AdapterError, match=r"model\.layers\.1\.self_attn\.q_proj\.weight: NaN or infinite.*float16"):
        merge_adapter(adapter, tmp_path / "merged") if into == "folder" else merge_and_unload(adapter)
    assert not (tmp_path / "merged").exists()
    assert list(tmp_path.iterdir()) == [base]


def test_an_adapter_is_not_exported_into_a_model(base, tmp_path):
    _, adapter = trained(base, LoraPlan(r=4))
    with pytest.raises(AdapterError, match="which holds a whole model"):
        export_adapter(adapter, base)
    assert not (base / "adapter_config.json").exists()


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
