"""Tiny transformers models, one for each model type: every parameter perturbed, rope_theta and epsilons off their
defaults.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB = 256
# Every type takes of these what its config class declares.
_COMMON: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "vocab_size": VOCAB, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 128, "n_inner": None,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48, "num_shared_experts": 1,
    "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "attention_dropout": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "hidden_dropout": 0.0,
    "rms_norm_eps": 1e-3, "layer_norm_eps": 1e-3, "layer_norm_epsilon": 1e-3, "norm_eps": 1e-3, "norm_epsilon": 1e-3,
    "mixer_rms_eps": 2e-3,
    "residual_dropout": 0.0, "embedding_dropout": 0.0, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0,
}  # fmt: skip

_LINEAR = {
    "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
_INDEXED = {"num_key_value_heads": 4, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 64}
_LATENT = {"num_key_value_heads": 4}
_WINDOW = {"sliding_window": 8}
_HEAD = {"head_dim": 16}
_SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}}
_CONV = {"layer_types": ["conv", "full_attention", "conv", "full_attention"]}

# What a type needs beyond the common values. Sequences are 24 tokens, so a window of 8 is active.
_OWN: dict[str, dict[str, Any]] = {
    "afmoe": {**_HEAD, **_WINDOW, "num_dense_layers": 1},
    "cohere2": {**_HEAD, **_WINDOW},
    "cwm": {**_HEAD, **_WINDOW},
    "dbrx": {
        "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 3700.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "deepseek_v32": _INDEXED,
    "exaone4": {**_HEAD, **_WINDOW},
    "falcon": {"ffn_hidden_size": 96, "bias": True, "layer_norm_epsilon": 1e-3},
    "falcon_h1": {**_HEAD, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16},
    "gemma": _HEAD,
    "gemma2": {**_HEAD, **_WINDOW},
    "gemma3_text": {**_HEAD, **_WINDOW, "num_hidden_layers": 7},
    "gemma3n_text": {
        **_HEAD, **_WINDOW, "num_hidden_layers": 10, "vocab_size_per_layer_input": VOCAB, "laurel_rank": 8,
        "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 2, "activation_sparsity_pattern": None,
    },
    "gemma4_text": {**_HEAD, **_WINDOW, "num_hidden_layers": 7, "vocab_size_per_layer_input": VOCAB},
    "glm": _HEAD,
    "glm4": _HEAD,
    "glm4_moe": _HEAD,
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": _INDEXED,
    "gpt_neox": {"intermediate_size": 256},
    "gpt_oss": {**_HEAD, **_WINDOW, "swiglu_limit": 0.4, "swiglu_alpha": 1.5},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention", "mamba", "attention"], "shared_intermediate_size": 48,
        "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 2,
    },
    "helium": _HEAD,
    "hunyuan_v1_dense": _HEAD,
    "internlm3": _HEAD,
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
        "mamba_d_state": 8, "mamba_dt_rank": 4,
    },
    "kimi_linear": {
        "layer_types": ["linear_attention"] * 3 + ["full_attention"], "num_key_value_heads": 4, "q_lora_rank": None,
        "linear_head_dim": 8, "linear_num_heads": 4,
    },
    "lfm2": {**_CONV, "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {**_CONV, "num_dense_layers": 1},
    "llama4_text": {**_HEAD, "num_experts_per_tok": 1, "intermediate_size_mlp": 96},
    "longcat_flash": {
        "num_key_value_heads": 4, "num_layers": 2, "head_dim": 8, "ffn_hidden_size": 64,
        "expert_ffn_hidden_size": 32, "zero_expert_num": 2, "moe_topk": 2,
    },
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 2},
    "mellum": _HEAD,
    "mimo_v2_flash": {**_WINDOW, "head_dim": 24, "v_head_dim": 8},
    "minicpm3": {"num_key_value_heads": 4, "dim_model_base": 32, "scale_emb": 2.0},
    "ministral": {**_HEAD, **_WINDOW},
    "ministral3": _HEAD,
    "mistral": _WINDOW,
    "mistral4": _LATENT,
    "mixtral": _WINDOW,
    # Equal key and value widths: transformers 5.23 cuts the fused convolution into equal parts when it saves.
    "olmo_hybrid": {
        "linear_num_key_heads": 4, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    },
    "olmo3": _WINDOW,
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 32, "dropout": 0.0},
    "phi3": _WINDOW,
    "phimoe": {**_WINDOW, "attention_bias": True, "lm_head_bias": True},
    "qwen2_5_vl_text": _SECTIONS,
    "qwen2_vl_text": _SECTIONS,
    "qwen3": {"head_dim": 24},
    "qwen3_5_moe_text": _LINEAR,
    "qwen3_5_text": _LINEAR,
    "qwen3_moe": _HEAD,
    "qwen3_next": _LINEAR,
    "qwen3_vl_moe_text": {**_HEAD, "moe_intermediate_size": 24},
    "qwen3_vl_text": _HEAD,
    "recurrent_gemma": {**_HEAD, "attention_window_size": 8, "num_key_value_heads": 1},
    "seed_oss": _HEAD,
    "starcoder2": _WINDOW,
}  # fmt: skip

# Multimodal type → its text type, and the class that trl builds where AutoModelForCausalLM would drop the vision part.
_MULTIMODAL = {
    "gemma3": ("gemma3_text", None),
    "gemma3n": ("gemma3n_text", None),
    "gemma4": ("gemma4_text", None),
    "llama4": ("llama4_text", "Llama4ForConditionalGeneration"),
    "llava": ("llama", "LlavaForConditionalGeneration"),
    "mistral3": ("mistral", "Mistral3ForConditionalGeneration"),
    "qwen2_5_vl": ("qwen2_5_vl_text", "Qwen2_5_VLForConditionalGeneration"),
    "qwen2_vl": ("qwen2_vl_text", "Qwen2VLForConditionalGeneration"),
    "qwen3_vl": ("qwen3_vl_text", "Qwen3VLForConditionalGeneration"),
    "qwen3_vl_moe": ("qwen3_vl_moe_text", "Qwen3VLMoeForConditionalGeneration"),
    "qwen3_5": ("qwen3_5_text", "Qwen3_5ForConditionalGeneration"),
    "qwen3_5_moe": ("qwen3_5_moe_text", "Qwen3_5MoeForConditionalGeneration"),
}
# Types that AutoModelForCausalLM does not know.
_UNLISTED = {"mistral4": "Mistral4ForCausalLM"}
_VISION: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
    "global_head_dim": 16, "intermediate_size": 32, "image_size": 28, "patch_size": 14, "depth": 1, "num_heads": 2,
    "out_hidden_size": 64, "embed_dim": 32,
    "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32,
}  # fmt: skip

# The model types the project answers for: each either verified or refused.
_NAMES = """
    afmoe apertus arcee bailing_hybrid bitnet cohere cohere2 cwm dbrx deepseek_v2 deepseek_v3 deepseek_v32 dots1
    ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon falcon_h1 falcon_mamba gemma gemma2 gemma3 gemma3_text
    gemma3n gemma3n_text gemma4 gemma4_text glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa gpt2 gpt_bigcode
    gpt_neox gpt_oss gptj granite granitemoe granitemoehybrid helium hunyuan_v1_dense internlm3 iquestcoder
    jamba kimi_linear laguna lfm2 lfm2_moe llama llama4 llama4_text llava longcat_flash mamba mamba2 mellum
    mimo_v2_flash minicpm3 minimax minimax_m2 ministral ministral3 mistral mistral3 mistral4 mixtral nanochat
    nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe opt phi phi3 phimoe qwen2 qwen2_5_vl qwen2_moe
    qwen2_vl qwen3 qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next qwen3_vl qwen3_vl_moe
    recurrent_gemma seed_oss smollm3 solar_open stablelm starcoder2
"""
MODEL_TYPES = tuple(_NAMES.split())


def make_config(model_type: str, **changes: Any) -> Any:
    """A tiny config of ``model_type``; ``changes`` win over everything."""
    cls = CONFIG_MAPPING[model_type]
    if model_type in _MULTIMODAL:
        text = make_config(_MULTIMODAL[model_type][0], **changes)
        vision = cls.sub_configs["vision_config"]
        # Where any vision model may stand, the one that stands there by default.
        named = {"model_type": cls().vision_config.model_type} if vision is AutoConfig else {}
        known = _keys(CONFIG_MAPPING[named["model_type"]] if named else vision)
        extra = {"audio_config": None} if model_type == "gemma4" else {}
        tied = {"tie_word_embeddings": changes["tie_word_embeddings"]} if "tie_word_embeddings" in changes else {}
        sizes = {k: v for k, v in _VISION.items() if k in known}
        return cls(text_config=text.to_dict(), vision_config={**named, **sizes}, **extra, **tied)
    known, aliases = _keys(cls), getattr(cls, "attribute_map", {})
    values = {k: v for k, v in _COMMON.items() if k in known}
    values = {k: v for k, v in values.items() if aliases.get(k) not in values}
    config = cls(**{**values, **copy.deepcopy(own_values(model_type)), **changes})
    for rope in _ropes(getattr(config, "rope_parameters", None)):
        rope["rope_theta"] *= 0.37
    return config


def config_keys(model_type: str) -> set[str]:
    """What the (text) config class of a type declares."""
    return _keys(CONFIG_MAPPING[_MULTIMODAL.get(model_type, (model_type, None))[0]])


def builder(model_type: str) -> Callable[..., torch.nn.Module]:
    """What makes the class of a type that trl builds, from its config."""
    name = _MULTIMODAL.get(model_type, (None, _UNLISTED.get(model_type)))[1]
    return getattr(transformers, name)._from_config if name else AutoModelForCausalLM.from_config


def own_values(model_type: str) -> dict[str, Any]:
    """What a type's tiny config has beyond the common values."""
    return _OWN.get(model_type, {})


def make_model(model_type: str, seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A tiny torch model in fp32, eval mode, no parameter at a default that could hide an error."""
    torch.manual_seed(seed)
    config = make_config(model_type, **changes)
    # Falcon's eager code adds ALiBi twice; what trl takes by default does not.
    attention = "sdpa" if model_type == "falcon" else "eager"
    model = builder(model_type)(config, attn_implementation=attention).eval().float()
    noise = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=noise) * 0.05)
            if model_type.startswith("gemma4") and path.endswith("q_norm.weight"):
                # Gemma 4 does not scale its scores: random ones would saturate the softmax and magnify rounding.
                parameter.mul_(0.25)
    return model


def make_ids(rows: int = 2, length: int = 24, seed: int = 3) -> torch.Tensor:
    """Token ids (rows, length) without special ones."""
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def _ropes(parameters: Any) -> list[dict[str, Any]]:
    if not parameters:
        return []
    candidates = [parameters, *(v for v in parameters.values() if isinstance(v, dict))]
    return [c for c in candidates if "rope_theta" in c]


def _keys(cls: type) -> set[str]:
    names = set(getattr(cls, "attribute_map", {}))
    for base in cls.__mro__:
        names |= set(getattr(base, "__annotations__", {})) | set(inspect.signature(base.__init__).parameters)
    return names
