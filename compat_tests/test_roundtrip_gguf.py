"""Adapters as GGUF: what llama.cpp adds to each weight is what PEFT adds, after llama.cpp's own reordering of rows.

The same files were compared, tensor by tensor and bit by bit, with those of llama.cpp's convert_lora_to_gguf.py
(build 11434) for each type of ``ARCHITECTURES``.
"""

import re

import gguf
import numpy as np
import pytest
from adapter_pairs import adapt_mlx, load_mlx, load_torch, make_base, quiet
from peft import PeftModel
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from hf_mlx.adapters.export import export_adapter
from hf_mlx.adapters.gguf_file import ARCHITECTURES, write_gguf
from hf_mlx.cli.main import main
from hf_mlx.errors import AdapterError

pytestmark = pytest.mark.usefixtures("uncompiled")

# llama.cpp's names of what transformers calls these.
NAMES = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "qkv_proj": "attn_qkv",
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down", "gate_up_proj": "ffn_up",
}  # fmt: skip
# Those that llama.cpp rotates in neighbouring pairs, by its own converter.
PAIRED = ("granite", "llama", "mistral", "smollm3")
SETTINGS = {
    "plain": {"r": 4, "lora_alpha": 8},
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True},
    "patterns": {"r": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 31, "layers.1.mlp.up_proj": 1}},
}


def deltas_in_gguf(path, paired, config):
    """HF path → what llama.cpp adds to its weight, rows in transformers' order."""
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["adapter.type"].contents() == "lora"
    alpha = reader.fields["adapter.lora.alpha"].contents()
    assert alpha != 0  # which llama.cpp would take for "no alpha", a scale of 1
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    back = {value: key for key, value in NAMES.items() if value != "ffn_up"}
    found = {}
    for name, b in tensors.items():
        if name.endswith(".lora_b"):
            layer, leaf = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight\.lora_b", name).groups()
            a = tensors[name.replace("lora_b", "lora_a")]
            # llama_adapter_lora_weight::get_scale: alpha over the second matrix's first dimension.
            delta = alpha / b.shape[1] * b @ a
            if paired and leaf in ("attn_q", "attn_k"):
                heads = config.num_attention_heads if leaf == "attn_q" else config.num_key_value_heads
                delta = LlamaTensorProcessor()._reverse_permute_weights(delta, heads, heads)
            fused = "gate_up_proj" if "attn_qkv" in "".join(tensors) else "up_proj"
            found[int(layer), fused if leaf == "ffn_up" else back[leaf]] = delta
    assert len(found) * 2 == len(tensors)
    return found


def deltas_in_peft(model):
    found = {}
    for path, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            layer, leaf = re.search(r"layers\.(\d+)\..*?(\w+)$", path).groups()
            found[int(layer), leaf] = module.get_delta_weight("default").detach().numpy()
    return found


def check(model_type, settings, tmp_path):
    base = make_base(model_type, tmp_path / "base")
    adapter = adapt_mlx(load_mlx(base), {"target_modules": "all-linear", **settings})
    export_adapter(adapter, tmp_path / "peft")
    with quiet():
        assert main(["export", str(tmp_path / "peft"), str(tmp_path / "out.gguf"), "--format", "gguf"]) == 0
        torch_model = PeftModel.from_pretrained(load_torch(base), tmp_path / "peft")
    theirs = deltas_in_peft(torch_model)
    ours = deltas_in_gguf(tmp_path / "out.gguf", model_type in PAIRED, torch_model.config)
    assert set(ours) == set(theirs)
    assert len(ours) >= 8
    for key, delta in theirs.items():
        assert ours[key].shape == delta.shape
        assert np.abs(ours[key] - delta).max() <= 1e-6 * max(np.abs(delta).max(), 1e-3)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_type_adds_what_peft_adds(model_type, tmp_path):
    check(model_type, {"r": 4, "lora_alpha": 8}, tmp_path)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_scales_and_ranks(model_type, settings, tmp_path):
    check(model_type, SETTINGS[settings], tmp_path)


REFUSED = {
    "dora": ("llama", {"use_dora": True}, "use_dora"),
    "bias": ("qwen2", {"bias": "all"}, "bias='all'"),
    "saved": ("llama", {"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "embedding": ("llama", {"target_modules": ["embed_tokens"]}, "embedding"),
    "type": ("jamba", {"target_modules": ["q_proj"]}, "model type 'jamba'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_cannot_add_is_refused(case, tmp_path):
    model_type, settings, message = REFUSED[case]
    base = make_base(model_type, tmp_path / "base", tie_word_embeddings=False)
    adapter = adapt_mlx(load_mlx(base), {"r": 4, "target_modules": ["q_proj"], **settings})
    with pytest.raises(AdapterError, match=message) as refused:
        write_gguf(adapter, tmp_path / "out.gguf")
    assert "hf-mlx merge" in refused.value.remedy
    assert not (tmp_path / "out.gguf").exists()


def test_the_output_is_a_file(tmp_path):
    adapter = adapt_mlx(load_mlx(make_base("llama", tmp_path / "base")), {"r": 4, "target_modules": ["q_proj"]})
    with pytest.raises(AdapterError, match=r"ends in \.gguf"):
        write_gguf(adapter, tmp_path / "out")
