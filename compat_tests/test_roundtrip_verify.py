"""verify_adapter: the line it prints, the receipt it writes, and that it sees what is wrong."""

import json

import pytest
from adapter_pairs import adapt_mlx, load_mlx, make_base, quiet
from safetensors.numpy import load_file, save_file

from hf_mlx import verify_adapter
from hf_mlx.adapters.export import export_adapter
from hf_mlx.adapters.verify import RECEIPT, TOLERANCE
from hf_mlx.cli.main import main
from hf_mlx.errors import AdapterError


@pytest.fixture
def folder(tmp_path):
    base = make_base("llama", tmp_path / "base")
    return export_adapter(adapt_mlx(load_mlx(base), {"r": 4, "use_dora": True}), tmp_path / "adapter")


def test_a_sound_adapter_gets_a_line_and_a_receipt(folder, capsys):
    with quiet():
        report = verify_adapter(folder)
    assert report.ok
    assert report.relative_difference <= 1e-5 < TOLERANCE
    assert report.adapter_effect > 1e-2
    assert (report.keys, report.prompts, report.missing, report.unexpected) == (24, 4, (), ())
    assert "ok:" in (line := capsys.readouterr().out)
    assert f"{report.largest_difference:.2e}" in line
    receipt = json.loads((folder / RECEIPT).read_text())
    assert receipt["ok"] is True
    assert receipt["largest_difference"] == report.largest_difference
    assert {"mlx", "peft", "torch", "transformers"} <= set(receipt["versions"])


def test_another_base_of_the_same_shape_is_compared_on_that_base(folder, tmp_path):
    other = make_base("llama", tmp_path / "other", seed=5)
    with quiet():
        report = verify_adapter(folder, other, prompts=[[3, 4, 5, 6]])
    assert (report.base, report.prompts, report.ok) == (str(other), 1, True)


def test_a_damaged_adapter_is_refused_where_peft_only_warns(folder):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.pop(next(key for key in tensors if "lora_B" in key))
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(AdapterError, match=r"1 key\(s\) missing"), quiet():
        verify_adapter(folder)


def test_a_no_op_says_so(tmp_path):
    base = make_base("llama", tmp_path / "base")
    adapter = adapt_mlx(load_mlx(base), {"r": 4}, moved=False)
    with quiet():
        report = verify_adapter(export_adapter(adapter, tmp_path / "adapter"))
    assert report.ok
    assert report.adapter_effect == 0


def test_an_adapter_on_a_multimodal_type_is_loaded_on_the_class_that_has_its_keys(tmp_path):
    base = make_base("qwen3_5", tmp_path / "base")
    adapter = adapt_mlx(load_mlx(base), {"target_modules": ["q_proj", "v_proj", "in_proj_z"]})
    with quiet():
        report = verify_adapter(export_adapter(adapter, tmp_path / "adapter"))
    assert report.ok
    assert report.adapter_effect > 1e-2
    assert len([note for note in adapter.notes if "Qwen3_5ForConditionalGeneration" in note]) == 1
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "Qwen3_5ForConditionalGeneration.from_pretrained" in card


def test_text_needs_a_tokenizer(folder):
    with pytest.raises(AdapterError, match="no tokenizer"):
        verify_adapter(folder, prompts=["hello"])


def test_the_command_exits_with_the_verdict(folder, capsys):
    with quiet():
        assert main(["verify", str(folder)]) == 0
        assert main(["verify", str(folder / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err
