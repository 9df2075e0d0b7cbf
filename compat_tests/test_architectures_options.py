"""Options that mlx-lm ignores or crashes on: honoured as transformers does, or refused by name."""

from __future__ import annotations

import json
from itertools import product

import mlx.core as mx
import numpy as np
import pytest
import torch
from architecture_checks import load_quietly, relative
from architecture_zoo import make_config, make_ids, make_model
from huggingface_hub.errors import StrictDataclassError
from mlx.utils import tree_flatten
from safetensors.torch import load_file, save_file

from hf_mlx.errors import ModelError
from hf_mlx.models.architectures import VERIFIED
from hf_mlx.models.doctor import diagnose
from hf_mlx.models.load import load_model
from hf_mlx.settings.plan import ModelPlan, PrecisionPlan

pytestmark = pytest.mark.usefixtures("uncompiled")

# fp32 on both sides; see test_architectures_matrix.
TOLERANCE = 1e-4

_SHORT, _LONG = [1.0 + 0.1 * i for i in range(8)], [2.0 + 0.3 * i for i in range(8)]
_LONGROPE = {
    "rope_type": "longrope", "rope_theta": 5000.0, "short_factor": _SHORT, "long_factor": _LONG,
    "original_max_position_embeddings": 32,
}  # fmt: skip
_SLIDING = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
_SHARED = ["sliding_attention", "full_attention"] * 2

CHANGES = {
    "falcon's newer architecture": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, 24),
    "falcon with alibi, one part after the other": (
        "falcon",
        {"alibi": True, "multi_query": False, "parallel_attn": False, "num_attention_heads": 2},
        24,
    ),
    "gpt_bigcode with a key for each head": ("gpt_bigcode", {"multi_query": False}, 24),
    "opt with norms behind": ("opt", {"do_layer_norm_before": False}, 24),
    "kimi linear, which ties nothing": ("kimi_linear", {"tie_word_embeddings": True}, 24),
    "kimi linear without attention": ("kimi_linear", {"layer_types": ["linear_attention"] * 4}, 24),
    "qwen2 with windows in some layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
        24,
    ),
    "qwen3 with windows by layer type": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 6, "layer_types": _SLIDING},
        24,
    ),
    "qwen3_moe with windows": ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 6}, 24),
    "dots1 with windows in some layers": ("dots1", {"sliding_window": 6, "max_window_layers": 2}, 24),
    "qwen2 whose window is off": ("qwen2", {"use_sliding_window": False, "sliding_window": 6}, 24),
    "mistral without a window": ("mistral", {"sliding_window": None}, 24),
    "llama with tied embeddings": ("llama", {"tie_word_embeddings": True}, 24),
    "llama with gelu": ("llama", {"hidden_act": "gelu"}, 24),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}, 24),
    "llama with its own head width": ("llama", {"head_dim": 24}, 24),
    "gemma2 without softcaps": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}, 24),
    "gemma2 with a head of its own and no cap": (
        "gemma2",
        {"tie_word_embeddings": False, "final_logit_softcapping": None},
        24,
    ),
    "gemma2 with one key-value head for each": ("gemma2", {"num_key_value_heads": 4}, 24),
    "gemma3_text shorter than its period": ("gemma3_text", {"num_hidden_layers": 3}, 24),
    "gemma4_text with shared keys": (
        "gemma4_text",
        {"num_kv_shared_layers": 2, "num_hidden_layers": 4, "layer_types": _SHARED},
        24,
    ),
    "smollm3 with rope everywhere": ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}, 24),
    "granitemoehybrid, dense": ("granitemoehybrid", {"num_local_experts": 0}, 24),
    "granitemoehybrid with rope": ("granitemoehybrid", {"position_embedding_type": "rope"}, 24),
    "qwen3_moe with dense layers": ("qwen3_moe", {"mlp_only_layers": [1]}, 24),
    "starcoder2 with exact gelu": ("starcoder2", {"hidden_act": "gelu"}, 24),
    "phi3 longrope within the original context": ("phi3", {"rope_parameters": _LONGROPE}, 24),
    "phi3 longrope beyond the original context": ("phi3", {"rope_parameters": _LONGROPE}, 40),
    "llama3 rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
            }
        },
        24,
    ),
    "linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}}, 24),
    "yarn": (
        "qwen3",
        {
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 32,
            },
        },
        24,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_an_option_is_honoured(name, tmp_path):
    model_type, changes, length = CHANGES[name]
    model, ids = make_model(model_type, **changes), make_ids(length=length)
    model.save_pretrained(tmp_path)

    loaded = load_quietly(tmp_path)

    assert _difference(loaded, model, ids) < TOLERANCE
    exported = loaded.names.export_weights(dict(tree_flatten(loaded.model.parameters())))
    assert len(exported) + len(loaded.names.untouched) == len(loaded.names.stored)


REFUSED = {
    "one expert, under Kimi's own names": ("kimi_linear", {"num_experts_per_tok": 1}, "num_experts_per_tok=1"),
    "clipped queries": ("olmoe", {"clip_qkv": 0.5}, "clip_qkv=0.5"),
    "a window that mlx-lm does not read": ("ministral3", {"sliding_window": 6}, "sliding_window=6"),
    "scores as they are": ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights=False"),
    "scores by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
    "scores as they are, with one key": ("gpt_bigcode", {"scale_attn_weights": False}, "scale_attn_weights=False"),
    "dropout in the base": ("llama", {"attention_dropout": 0.1}, "attention_dropout=0.1"),
    "gpt2 at its defaults": ("gpt2", {"attn_pdrop": 0.1, "resid_pdrop": 0.1}, "attn_pdrop=0.1"),
    "router noise": ("mixtral", {"router_jitter_noise": 0.01}, "router_jitter_noise=0.01"),
    "another activation": ("qwen2", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    "renormalised routing": ("qwen2_moe", {"norm_topk_prob": True}, "norm_topk_prob=True"),
    "a rope mlx-lm leaves out": (
        "mixtral",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}},
        "rope_type='linear'",
    ),
    "softcap in gemma3": ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
    "bias mlx-lm has no place for": ("qwen3", {"attention_bias": True}, "do not fit"),
    "llama 4 with a period of its own": ("llama4_text", {"no_rope_layer_interval": 2}, "no_rope_layers=[1, 0, 1, 0]"),
    "llama 4 with two experts a token": ("llama4_text", {"num_experts_per_tok": 2}, "num_experts_per_tok=2"),
    "kimi without linear attention": ("kimi_linear", {"layer_types": ["full_attention"] * 4}, "layer_types="),
    "full attention out of step": (
        "gemma3_text",
        {"num_hidden_layers": 4, "layer_types": [*_SHARED[:2], *_SHARED[:1], "full_attention"][::-1]},
        "layer_types=",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_an_option_that_cannot_be_honoured_is_refused(name, tmp_path):
    model_type, changes, words = REFUSED[name]
    make_model(model_type, **changes).save_pretrained(tmp_path)

    with pytest.raises(ModelError) as refused:
        load_model(tmp_path, ModelPlan())

    assert words in refused.value.received


_ORIGINAL = {"original_max_position_embeddings": 32}
_YARN = {"rope_type": "yarn", "factor": 4.0, **_ORIGINAL}
ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **_ORIGINAL},
    "yarn": _YARN,
    "yarn with betas": {**_YARN, "beta_fast": 16, "beta_slow": 2},
    "yarn with its own attention factor": {**_YARN, "attention_factor": 1.3},
    "yarn with a range that is not rounded": {**_YARN, "truncate": False},
    "yarn with mscale": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    "yarn with uneven mscale": {**_YARN, "mscale": 0.707, "mscale_all_dim": 1.0},
}
ROPE_SAMPLE = ("deepseek_v2", "deepseek_v3", "ministral3", "gemma3_text", "ernie4_5", "llama")


@pytest.mark.parametrize(
    "model_type", [t if t in ROPE_SAMPLE else pytest.param(t, marks=pytest.mark.wide) for t in sorted(VERIFIED)]
)
def test_every_rope_type_is_computed_or_refused(model_type, tmp_path):
    rope = getattr(make_config(model_type).get_text_config(), "rope_parameters", None)
    nested = [key for key, value in (rope or {}).items() if isinstance(value, dict)]
    answered = 0
    for number, (entry, (name, changes)) in enumerate(product(nested or [None], ROPES.items())):
        if not rope:
            break
        folder = tmp_path / str(number)
        changed = {**rope, **changes} if entry is None else {**rope, entry: {**rope[entry], **changes}}
        try:
            model, ids = make_model(model_type, rope_parameters=changed), make_ids(length=40)
            expected = model(ids, use_cache=False).logits.detach().numpy()
        except (TypeError, KeyError, ValueError, RuntimeError, StrictDataclassError):
            continue  # transformers has no such model
        model.save_pretrained(folder)
        answered += 1
        try:
            loaded = load_quietly(folder)
        except ModelError as refused:
            assert "rope_type" in refused.received, name
            continue
        assert relative(np.array(loaded.model(mx.array(ids.numpy()))), expected) < TOLERANCE, (entry, name)
    # Without rotary positions there is nothing to ask; Phi-3's config takes longrope alone.
    assert answered >= 2 or not rope or model_type == "phi3"


def test_experts_lie_either_way_round_in_files_of_qwen3_vl_moe(tmp_path):
    """The hub's files hold (E, H, 2I), those of transformers 5 (E, 2I, H)."""
    model, ids = make_model("qwen3_vl_moe"), make_ids()
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    turned = {n: v.transpose(1, 2).contiguous() for n, v in stored.items() if ".experts." in n}
    save_file({**stored, **turned}, tmp_path / "model.safetensors", {"format": "pt"})

    loaded = load_quietly(tmp_path)
    exported = loaded.names.export_weights(dict(tree_flatten(loaded.model.parameters())))

    assert len(turned) == 8
    assert all(np.array_equal(np.array(exported[n]), v.numpy()) for n, v in turned.items())
    expected = model(ids, use_cache=False).logits.detach().numpy()
    assert relative(np.array(loaded.model(mx.array(ids.numpy()))), expected) < TOLERANCE


def test_a_text_model_that_mlx_lm_would_build_as_another_is_refused(tmp_path):
    make_model("llava").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"] = make_config("qwen2").to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))

    with pytest.raises(ModelError, match=r"text_config\.model_type='qwen2'"):
        load_model(tmp_path, ModelPlan())


@pytest.mark.parametrize("method", ["fp8", "awq", "gptq", "mxfp4", "compressed-tensors", "bitnet"])
def test_weights_quantised_for_cuda_are_refused(method, tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))

    with pytest.raises(ModelError, match=f"quantised by '{method}'") as refused:
        load_model(tmp_path, ModelPlan())

    assert "quantization_config=BitsAndBytesConfig(load_in_4bit=True)" in refused.value.remedy


def test_gpt2_as_it_comes_is_told_every_key_to_set_to_zero(tmp_path):
    dropouts = {"attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1}
    make_model("gpt2", **dropouts).save_pretrained(tmp_path)

    with pytest.raises(ModelError) as refused:
        load_model(tmp_path, ModelPlan())

    assert all(f"{key}=0.1" in refused.value.received for key in dropouts)
    assert all(f"{key}=0.0" in refused.value.remedy for key in dropouts)


def test_a_config_of_transformers_4_loads_the_same(tmp_path):
    model, ids = make_model("llama"), make_ids()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope["rope_theta"], "rope_scaling": None, "transformers_version": "4.44.0"}
    config["torch_dtype"] = config.pop("dtype")
    (tmp_path / "config.json").write_text(json.dumps(config))

    assert _difference(load_quietly(tmp_path), model, ids) < TOLERANCE


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_is_as_far_from_fp32_as_torch_is(dtype, tmp_path):
    model, ids = make_model("gemma3_text"), make_ids()
    model.save_pretrained(tmp_path)
    exact = model(ids).logits.detach().numpy()
    low = model.to(getattr(torch, dtype))(ids).logits.detach().float().numpy()

    loaded = load_quietly(tmp_path, ModelPlan(precision=PrecisionPlan(dtype=dtype)))
    ours = np.array(loaded.model(mx.array(ids.numpy())).astype(mx.float32))

    assert {str(v.dtype) for _, v in tree_flatten(loaded.model.parameters())} == {f"mlx.core.{dtype}"}
    # Rounding of a handful of layers, in another order: not more than twice torch's own.
    assert relative(ours, exact) < 2 * relative(low, exact)


def test_a_folder_that_mlx_lm_converted_keeps_its_names(tmp_path):
    from mlx_lm.utils import save

    model, ids = make_model("qwen3_moe"), make_ids()
    model.save_pretrained(tmp_path / "hf")
    loaded = load_quietly(tmp_path / "hf")
    save(tmp_path / "mlx", tmp_path / "hf", loaded.model, _Tokenizer(), loaded.config)

    converted = load_quietly(tmp_path / "mlx")

    assert _difference(converted, model, ids) < TOLERANCE
    assert converted.names.to_hf_modules("model.layers.0.mlp.switch_mlp.up_proj") == [
        f"model.layers.0.mlp.experts.{e}.up_proj" for e in range(4)
    ]


def test_doctor_finds_a_right_model_right(tmp_path):
    make_model("qwen3").save_pretrained(tmp_path)

    found = diagnose(tmp_path)

    assert found.ok
    assert found.gradient_of == "model.layers.3.mlp.down_proj.weight"
    assert "computes what transformers computes" in str(found)


def test_doctor_finds_a_wrong_model_wrong(tmp_path, monkeypatch):
    make_model("qwen3").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    read = load_model

    def misread(folder, plan):
        loaded = read(folder, plan)
        for block in loaded.model.layers:
            block.input_layernorm.eps = 0.5
        return loaded

    monkeypatch.setattr("hf_mlx.models.doctor.load_model", misread)
    found = diagnose(tmp_path)

    assert config["model_type"] == found.model_type
    assert not found.ok
    assert "WRONG" in str(found)


def _difference(loaded, model, ids) -> float:
    with torch.no_grad():
        theirs = model(ids, use_cache=False).logits.numpy()
    return relative(np.array(loaded.model(mx.array(ids.numpy()))), theirs)


class _Tokenizer:
    """mlx_lm.utils.save wants something that saves itself."""

    def save_pretrained(self, folder) -> None:
        """Nothing to save."""
