"""What is wrong with a model folder is said by name, with the remedy, before anything is computed."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_checkpoints import llama_tensors, write_llama

from hf_mlx.errors import ModelError
from hf_mlx.models.load import load_model
from hf_mlx.models.tokenizer import load_tokenizer
from hf_mlx.settings.plan import ModelPlan


def _edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _without(*keys: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in keys}))

    return edit


def _rewrite_header(folder: Path, edit: Callable[[dict], object]) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    replaced = edit(header)
    text = json.dumps(header if replaced is None else replaced).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def _cut(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])


def _reshape(header: dict) -> None:
    header["model.norm.weight"]["shape"] = [31]


def _overlap(header: dict) -> None:
    first = header["lm_head.weight"]["data_offsets"]
    header["model.embed_tokens.weight"]["data_offsets"] = first


def _retype(header: dict) -> None:
    header["model.norm.weight"]["dtype"] = "F24"


def _index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _drop_tensor(folder: Path) -> None:
    tensors = llama_tensors()
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    write_llama(folder, tensors)


def _extra_tensor(folder: Path) -> None:
    write_llama(folder, {**llama_tensors(), "model.layers.1.self_attn.q_proj.bias": np.zeros(32, np.float32)})


def _only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _only_gguf(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights.gguf")


def _stored_twice(folder: Path) -> None:
    (folder / "model-old.safetensors").write_bytes((folder / "model.safetensors").read_bytes())


def _adapter_folder(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text("{}")


# name → (what is done to a good folder, words of the received line, words of the remedy)
FAULTS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json", "config.json"),
    "an adapter": (_adapter_folder, "no config.json", "base model"),
    "config is not JSON": (lambda f: (f / "config.json").write_text("{"), "not readable as JSON", "save_pretrained"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "not a JSON object", "save_pretrained"),
    "no model_type": (_without("model_type"), "model_type", "save_pretrained"),
    "config with a wrong type": (lambda f: _edit_config(f, hidden_size="many"), "cannot read it", "save_pretrained"),
    "unknown model type": (lambda f: _edit_config(f, model_type="quux"), "'quux'", "SFTTrainer"),
    "model type with a path": (lambda f: _edit_config(f, model_type="../llama"), "'../llama'", "SFTTrainer"),
    "known wrong model type": (
        lambda f: _edit_config(f, model_type="recurrent_gemma"),
        "its logits differ",
        "SFTTrainer",
    ),
    "code in the checkpoint": (
        lambda f: _edit_config(f, model_type="quux", auto_map={"AutoModelForCausalLM": "m.M"}),
        "Python code",
        "trust_remote_code",
    ),
    "mlx-lm code in the checkpoint": (lambda f: _edit_config(f, model_file="model.py"), "model.py", "SFTTrainer"),
    "bitsandbytes weights": (
        lambda f: _edit_config(f, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "bitsandbytes",
        "load_in_4bit",
    ),
    "dropout": (lambda f: _edit_config(f, attention_dropout=0.1), "attention_dropout=0.1", "0.0"),
    "unknown rope": (
        lambda f: _edit_config(f, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        "rope_type='dynamic'",
        "SFTTrainer",
    ),
    "unknown activation": (lambda f: _edit_config(f, hidden_act="laplace"), "hidden_act='laplace'", "SFTTrainer"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weight file", "save_pretrained"),
    "only a pickle": (_only_pickle, "pytorch_model.bin", "save_pretrained"),
    "only a GGUF": (_only_gguf, "weights.gguf", "gguf_file"),
    "empty weight file": (lambda f: _cut(f, 0), "model.safetensors", "fetch it again"),
    "cut in the header": (lambda f: _cut(f, 100), "header", "fetch it again"),
    "cut in the data": (lambda f: _cut(f, 4000), "bytes of data", "fetch it again"),
    "bytes appended": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes() + b"x" * 8),
        "bytes of data",
        "fetch it again",
    ),
    "header is not JSON": (
        lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 16) + b"{" * 16),
        "not readable as JSON",
        "fetch it again",
    ),
    "a pickle renamed": (lambda f: (f / "model.safetensors").write_bytes(b"\x80\x04" * 50), "header", "fetch it again"),
    "shape edited": (lambda f: _rewrite_header(f, _reshape), "model.norm.weight", "fetch it again"),
    "offsets overlap": (lambda f: _rewrite_header(f, _overlap), "starts at byte", "fetch it again"),
    "unknown dtype": (lambda f: _rewrite_header(f, _retype), "not valid", "fetch it again"),
    "entry is a number": (lambda f: _rewrite_header(f, lambda h: {**h, "x": 3}), "not valid", "fetch it again"),
    "index names a missing shard": (
        lambda f: _index(f, {"model.norm.weight": "model-00002-of-00002.safetensors"}),
        "not there",
        "hf download",
    ),
    "index places a tensor wrongly": (
        lambda f: _index(f, {"no.such.weight": "model.safetensors"}),
        "no.such.weight",
        "download the whole folder",
    ),
    "index is not one": (lambda f: _index(f, 3), "not a readable index", "save_pretrained"),
    "tensor stored twice": (_stored_twice, "again in", 'save_pretrained("a-new-folder")'),
    "tensor missing": (_drop_tensor, "up_proj", "save_pretrained"),
    "tensor too many": (_extra_tensor, "q_proj.bias", "save_pretrained"),
    "config of a wider model": (lambda f: _edit_config(f, intermediate_size=64), "do not fit", "save_pretrained"),
    "config of a deeper model": (lambda f: _edit_config(f, num_hidden_layers=3), "do not fit", "save_pretrained"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_folder_is_refused_by_name(fault, tmp_path):
    breaks, received, remedy = FAULTS[fault]
    folder = write_llama(tmp_path / "model")
    breaks(folder)

    with pytest.raises(ModelError) as refused:
        load_model(folder, ModelPlan())

    assert received in refused.value.received
    assert remedy in refused.value.remedy
    assert "hf_mlx/" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("./no/such/folder", "no such folder"),
        ("owner/no-such-model", "the hub did not give it"),
        ("", "no such folder"),
    ],
)
def test_a_model_that_is_nowhere_is_refused(name, words):
    with pytest.raises(ModelError, match=words):
        load_model(name, ModelPlan())


def test_a_file_in_place_of_a_folder_is_refused(tmp_path):
    folder = write_llama(tmp_path)

    with pytest.raises(ModelError, match="is a file"):
        load_model(folder / "config.json", ModelPlan())


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ModelError, match="no tokenizer") as refused:
        load_tokenizer(write_llama(tmp_path), ModelPlan())

    assert "processing_class=" in refused.value.remedy


def test_an_unreadable_tokenizer_is_refused(tmp_path):
    folder = write_llama(tmp_path)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')

    with pytest.raises(ModelError, match="cannot read the tokenizer"):
        load_tokenizer(folder, ModelPlan())
