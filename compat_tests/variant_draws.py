"""Configurations of a model type drawn at random among what real checkpoints vary, and what becomes of one."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch
from architecture_checks import load_quietly, relative
from architecture_zoo import config_keys, make_config, make_ids, make_model, own_values
from training_checks import quiet

from hf_mlx.errors import HFMLXError

_ORIGINAL = {"original_max_position_embeddings": 32}
ROPES: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **_ORIGINAL},
    {"rope_type": "yarn", "factor": 4.0, **_ORIGINAL},
    {"rope_type": "yarn", "factor": 4.0, "truncate": False, **_ORIGINAL},
    {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.3, "beta_fast": 16, "beta_slow": 2, **_ORIGINAL},
    {"partial_rotary_factor": 0.5},
]
# Key → values that it may take; a draw takes those that the config class declares.
_VALUES: dict[str, list[Any]] = {
    "tie_word_embeddings": [True, False],
    **{key: [True, False] for key in ("attention_bias", "mlp_bias", "use_bias", "qkv_bias", "use_qkv_bias", "bias")},
    **{key: [True, False] for key in ("use_qk_norm", "qk_layernorm", "norm_topk_prob", "use_parallel_residual")},
    "num_key_value_heads": [1, 2, 4],
    "head_dim": [8, 16, 32],
    "sliding_window": [3, 8, 64, None],
    "use_sliding_window": [True, False],
    "max_window_layers": [0, 2, 4],
    "num_hidden_layers": [1, 2, 3, 5],
    "hidden_act": ["silu", "gelu", "gelu_pytorch_tanh", "relu"],
    "num_experts_per_tok": [1, 2, 3],
    "n_group": [1, 2],
    "routed_scaling_factor": [1.0, 2.5],
    "n_shared_experts": [1, 2],
    "num_shared_experts": [1, 2],
    "first_k_dense_replace": [0, 1, 2],
    "mlp_only_layers": [[], [1]],
    "decoder_sparse_step": [1, 2],
    "q_lora_rank": [24, None],
    "logit_scale": [0.1, 1.0],
    "logits_scaling": [1.0, 3.0],
    "residual_multiplier": [1.0, 0.3],
    "embedding_multiplier": [1.0, 4.0],
    "attention_multiplier": [1.0, 0.2],
    "attn_logit_softcapping": [None, 5.0],
    "final_logit_softcapping": [None, 3.0],
    "query_pre_attn_scalar": [16, 64],
    "clip_qkv": [None, 0.5],
    "no_rope_layer_interval": [2, 4],
    "swiglu_limit": [0.3, 7.0],
    "scale_emb": [1.0, 12.0],
    **{key: [True, False] for key in ("alibi", "multi_query", "parallel_attn", "new_decoder_architecture")},
    "num_ln_in_parallel_attn": [None, 1, 2],
    **{key: [True, False] for key in ("do_layer_norm_before", "enable_bias", "layer_norm_elementwise_affine")},
    "word_embed_proj_dim": [32, 64],
    **{key: ["gelu", "relu", "gelu_new"] for key in ("activation", "activation_function")},
    "expand": [1, 2],
    "conv_kernel": [2, 4],
    "n_groups": [1, 2],
    "use_conv_bias": [True, False],
}
# Keys that go with others: one alone makes a config that no checkpoint has.
_FIXED = {
    # Sizes that transformers' code takes for equal to others, and another name for moe_topk.
    "longcat_flash": ("head_dim", "num_experts_per_tok", "num_key_value_heads", "q_lora_rank"),
    "qwen3_5_moe": ("tie_word_embeddings",),
}


def draw(model_type: str, number: int) -> dict[str, Any]:
    """Changes to the tiny config, the same ones each time."""
    rng = random.Random(f"{model_type} {number}")
    known = config_keys(model_type)
    keys = [key for key in _VALUES if key in known and key not in _FIXED.get(model_type, ())]
    changes = {key: rng.choice(_VALUES[key]) for key in rng.sample(keys, min(len(keys), rng.randint(1, 4)))}
    types = own_values(model_type).get("layer_types")
    if types and "num_hidden_layers" in changes:
        changes["layer_types"] = (types * 2)[: changes["num_hidden_layers"]]
    rope = getattr(make_config(model_type).get_text_config(), "rope_parameters", None)
    if rope and "rope_theta" in rope and rng.random() < 0.5:
        changes["rope_parameters"] = {**rope, **rng.choice(ROPES)}
    return changes


def answer(model_type: str, changes: dict[str, Any], folder: Path) -> str | float | None:
    """The relative difference of the logits, the words of a refusal, or None where transformers has no such model."""
    try:
        with quiet(), torch.no_grad():
            model, ids = make_model(model_type, **changes), make_ids(length=40)
            expected = model(ids, use_cache=False).logits.numpy()
            model.save_pretrained(folder)
    except Exception:
        # Whatever transformers makes of a draw that contradicts itself.
        return None
    if not np.isfinite(expected).all():
        return None
    try:
        loaded = load_quietly(folder)
    except HFMLXError as refused:
        return refused.received
    return relative(np.array(loaded.model(mx.array(ids.numpy()))), expected)
