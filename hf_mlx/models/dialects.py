"""What each model type's config needs beyond the generic un-nesting: HF key → the key mlx-lm reads.

Each function takes a config that :func:`hf_mlx.models.config.unnest_rope` has flattened, edits it and
returns it. The HF side is transformers 5.23's configuration class of the same type, the MLX side
``ModelArgs`` in mlx-lm 0.32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import ModelError

Config = dict[str, Any]
Dialect = Callable[[Config], Config]
DIALECTS: dict[str, Dialect] = {}


def _speaks(*model_types: str) -> Callable[[Dialect], Dialect]:
    def register(function: Dialect) -> Dialect:
        DIALECTS.update(dict.fromkeys(model_types, function))
        return function

    return register


def _default(config: Config, **values: Any) -> None:
    for key, value in values.items():
        if config.get(key) is None:
            config[key] = value


def _head_dim(config: Config) -> None:
    _default(config, head_dim=config["hidden_size"] // config["num_attention_heads"])


def _pattern(config: Config) -> int:
    """Layers from one full-attention layer to the next (6 in Gemma 3): 1-based index of the first one."""
    types = config.get("layer_types")
    if types:
        period = types.index("full_attention") + 1 if "full_attention" in types else len(types) + 1
        if any((t == "full_attention") != ((i + 1) % period == 0) for i, t in enumerate(types)):
            raise ModelError(
                f"layer_types={types}",
                "full attention at a fixed period, which is all that mlx-lm's code of this type knows",
                "train this checkpoint with trl.SFTTrainer",
            )
        return period
    return config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6


def _theta(config: Config, layer_type: str, default: float) -> float:
    rope = config.get("rope_parameters") or {}
    return (rope.get(layer_type) or {}).get("rope_theta", default)


@_speaks("llama", "iquestcoder", "mistral", "ministral")
def _llama(config: Config) -> Config:
    # llama.py needs a full-attention layer to exist; windows are put on the blocks instead (overrides.windows).
    config["layer_types"] = ["full_attention"] * config["num_hidden_layers"]
    config["sliding_window"] = None
    _default(config, tie_word_embeddings=False)
    return config


@_speaks("smollm3")
def _smollm3(config: Config) -> Config:
    return _llama(config)


@_speaks("gemma3_text")
def _gemma3_text(config: Config) -> Config:
    config["sliding_window_pattern"] = _pattern(config)
    _default(config, rope_local_base_freq=10_000.0)
    config["rope_local_base_freq"] = _theta(config, "sliding_attention", config["rope_local_base_freq"])
    return config


@_speaks("gemma3")
def _gemma3(config: Config) -> Config:
    text = config["text_config"]
    # gemma3.py overwrites the text vocabulary with its own top-level default otherwise.
    _default(config, vocab_size=text.get("vocab_size", 262_208))
    text["model_type"] = "gemma3_text"
    config["text_config"] = _gemma3_text(text)
    return config


@_speaks("cohere2")
def _cohere2(config: Config) -> Config:
    config["sliding_window_pattern"] = _pattern(config)
    return config


@_speaks("exaone4")
def _exaone4(config: Config) -> Config:
    _head_dim(config)
    types = config.get("layer_types") or ["full_attention"] * config["num_hidden_layers"]
    sliding = config.get("sliding_window") is not None and "sliding_attention" in types
    period = _pattern(config) if sliding else 0
    config["sliding_window_pattern"] = "L" * (period - 1) + "G" if sliding else None
    if not sliding:
        config["sliding_window"] = None
    return config


@_speaks("exaone_moe")
def _exaone_moe(config: Config) -> Config:
    _head_dim(config)
    types = config.get("mlp_layer_types")
    if types:
        config["is_moe_layer"] = [t == "sparse" for t in types]
    return config


@_speaks("lfm2", "lfm2_moe")
def _lfm2(config: Config) -> Config:
    _default(config, block_dim=config["hidden_size"], block_ff_dim=config["intermediate_size"])
    return config


@_speaks("apertus")
def _apertus(config: Config) -> Config:
    _default(config, mlp_bias=False, qk_norm=True, post_norm=False)
    return config


@_speaks("gemma4_text")
def _gemma4_text(config: Config) -> Config:
    for layer in (config.get("per_layer_config") or {}).values():
        if not isinstance(layer, dict):
            continue
        for theirs, ours in (("head_dim", "global_head_dim"), ("num_key_value_heads", "num_global_key_value_heads")):
            if layer.get(theirs) is not None:
                config[ours] = layer[theirs]
    for key, value in (
        ("global_head_dim", config["head_dim"]),
        ("hidden_size_per_layer_input", 0),
        ("num_kv_shared_layers", 0),
        ("use_double_wide_mlp", False),
        ("enable_moe_block", False),
    ):
        _default(config, **{key: value})
    config.setdefault("final_logit_softcapping", None)
    return config


@_speaks("gemma4")
def _gemma4(config: Config) -> Config:
    text = config["text_config"]
    config["vocab_size"] = text.get("vocab_size", config.get("vocab_size"))
    text["model_type"] = "gemma4_text"
    config["text_config"] = _gemma4_text(text)
    return config


@_speaks("gpt_neox")
def _gpt_neox(config: Config) -> Config:
    config["rotary_emb_base"] = config.get("rope_theta", 10_000.0)
    config["rotary_pct"] = config.get("partial_rotary_factor", config.get("rotary_pct", 0.25))
    return config


@_speaks("gpt2")
def _gpt2(config: Config) -> Config:
    _default(config, n_ctx=config["n_positions"], num_key_value_heads=config["n_head"])
    return config


@_speaks("gpt_bigcode")
def _gpt_bigcode(config: Config) -> Config:
    _default(config, n_inner=4 * config["n_embd"])
    return config


@_speaks("mamba", "mamba2", "falcon_mamba")
def _mamba(config: Config) -> Config:
    _default(config, intermediate_size=int(config["expand"] * config["hidden_size"]))
    return config


@_speaks("granitemoehybrid")
def _granitemoehybrid(config: Config) -> Config:
    kinds = {"linear_attention": "mamba", "full_attention": "attention"}
    if not config.get("num_local_experts"):
        # A dense model's only MLP is the shared one.
        config["intermediate_size"] = config["shared_intermediate_size"]
    # mlx-lm turns unless told "nope"; transformers turns only if told "rope".
    config["position_embedding_type"] = "rope" if config.get("position_embedding_type") == "rope" else "nope"
    config["layer_types"] = [kinds.get(t, t) for t in config["layer_types"]]
    return config


@_speaks("deepseek_v2")
def _deepseek_v2(config: Config) -> Config:
    _default(config, rope_scaling={"factor": 1.0})
    return config


@_speaks("minicpm3")
def _minicpm3(config: Config) -> Config:
    _default(config, rope_scaling={"original_max_position_embeddings": config["max_position_embeddings"]})
    return config


@_speaks("qwen3_moe", "mellum")
def _qwen3_moe(config: Config) -> Config:
    _default(config, num_experts=config.get("num_local_experts"), mlp_only_layers=[], decoder_sparse_step=1)
    _head_dim(config)
    return config


@_speaks("qwen3_next")
def _qwen3_next(config: Config) -> Config:
    _default(config, num_experts=config.get("num_local_experts"), mlp_only_layers=[], decoder_sparse_step=1)
    config["full_attention_interval"] = _pattern(config)
    return config


@_speaks("qwen3_5_text", "qwen3_5_moe_text")
def _qwen3_5_text(config: Config) -> Config:
    text = dict(config)
    _default(text, num_experts=text.get("num_local_experts", 0))
    text["full_attention_interval"] = _pattern(text)
    outer = {k: text[k] for k in ("architectures", "tie_word_embeddings") if k in text}
    return {**outer, "model_type": config["model_type"].removesuffix("_text"), "text_config": text}


@_speaks("qwen3_5", "qwen3_5_moe")
def _qwen3_5(config: Config) -> Config:
    text = config["text_config"]
    text["tie_word_embeddings"] = bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
    config["text_config"] = _qwen3_5_text(text)["text_config"]
    return config


@_speaks("glm4_moe")
def _glm4_moe(config: Config) -> Config:
    _default(config, partial_rotary_factor=0.5)
    return config


@_speaks("glm4_moe_lite")
def _glm4_moe_lite(config: Config) -> Config:
    types = config.get("mlp_layer_types")
    if types:
        config["first_k_dense_replace"] = types.index("sparse") if "sparse" in types else len(types)
    return config


@_speaks("kimi_linear")
def _kimi_linear(config: Config) -> Config:
    types = config["layer_types"]
    _default(
        config,
        rope_theta=10_000.0,
        model_max_length=config.get("max_position_embeddings") or config.get("model_max_length") or 0,
        num_experts=config.get("num_local_experts"),
        num_experts_per_token=config.get("num_experts_per_tok"),
        num_shared_experts=config.get("n_shared_experts"),
        moe_renormalize=config.get("norm_topk_prob"),
        num_expert_group=config.get("n_group"),
        mla_use_nope=True,
        # Layers are counted from 1 there.
        linear_attn_config={
            "num_heads": config["linear_num_heads"],
            "head_dim": config["linear_head_dim"],
            "short_conv_kernel_size": config["linear_conv_kernel_dim"],
            "kda_layers": [i + 1 for i, t in enumerate(types) if t == "linear_attention"],
            "full_attn_layers": [i + 1 for i, t in enumerate(types) if t == "full_attention"],
        },
    )
    return _glm4_moe_lite(config)


@_speaks("llama4_text")
def _llama4_text(config: Config) -> Config:
    outer = {k: config[k] for k in ("architectures", "tie_word_embeddings") if k in config}
    return {**outer, "model_type": "llama4", "text_config": config}


@_speaks("solar_open")
def _solar_open(config: Config) -> Config:
    # No layer is dense, so the dense width is never read.
    _default(config, intermediate_size=config["moe_intermediate_size"])
    _default(config, first_k_dense_replace=0, use_qk_norm=False, partial_rotary_factor=1.0)
    return config


@_speaks("glm_moe_dsa")
def _glm_moe_dsa(config: Config) -> Config:
    _default(config, topk_method="noaux_tc", scoring_func="sigmoid", moe_layer_freq=1)
    return _glm4_moe_lite(config)


@_speaks("minimax_m2")
def _minimax_m2(config: Config) -> Config:
    _head_dim(config)
    _default(
        config,
        rotary_dim=int(config["head_dim"] * config.get("partial_rotary_factor", 1.0)),
        shared_intermediate_size=0,
    )
    return config


@_speaks("nemotron_h")
def _nemotron_h(config: Config) -> Config:
    # transformers 5.23 NemotronHMamba2Mixer clamps at time_step_min and does not read time_step_limit.
    config["time_step_limit"] = (config.get("time_step_min", 0.0), float("inf"))
    return config


@_speaks("mimo_v2_flash")
def _mimo_v2_flash(config: Config) -> Config:
    types = config["layer_types"]
    config.setdefault("n_shared_experts", None)
    config["hybrid_layer_pattern"] = [int(t == "sliding_attention") for t in types]
    if config.get("mlp_layer_types"):
        config["moe_layer_freq"] = [int(t == "sparse") for t in config["mlp_layer_types"]]
    _default(
        config,
        sliding_window_size=config.get("sliding_window"),
        add_swa_attention_sink_bias=True,
        add_full_attention_sink_bias=False,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        layernorm_epsilon=config["rms_norm_eps"],
        swa_num_attention_heads=config["num_attention_heads"],
        # transformers 5.23 MiMoV2FlashAttention doubles the key-value heads of sliding layers.
        swa_num_key_value_heads=2 * config["num_key_value_heads"],
        swa_head_dim=config["head_dim"],
        swa_v_head_dim=config["v_head_dim"],
        swa_rope_theta=_theta(config, "sliding_attention", 10_000.0),
    )
    return config


@_speaks("longcat_flash")
def _longcat_flash(config: Config) -> Config:
    _default(
        config,
        attention_method="MLA",
        zero_expert_type="identity",
        mla_scale_q_lora=True,
        mla_scale_kv_lora=True,
    )
    return config
