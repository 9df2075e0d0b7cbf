"""Mixtures of experts, and hybrids with them."""

from __future__ import annotations

from .contract import Config, fill, set_head_dim, sliding_period, speaks, theta


@speaks("granitemoehybrid")
def _granitemoehybrid(config: Config) -> Config:
    kinds = {"linear_attention": "mamba", "full_attention": "attention"}
    if not config.get("num_local_experts"):
        # A dense model's only MLP is the shared one.
        config["intermediate_size"] = config["shared_intermediate_size"]
    # mlx-lm turns unless told "nope"; transformers turns only if told "rope".
    config["position_embedding_type"] = "rope" if config.get("position_embedding_type") == "rope" else "nope"
    config["layer_types"] = [kinds.get(t, t) for t in config["layer_types"]]
    return config


@speaks("jamba")
def _jamba(config: Config) -> Config:
    # mlx-lm adds the offset where transformers compares with it.
    config["expert_layer_offset"] = -config["expert_layer_offset"] % config["expert_layer_period"]
    return config


@speaks("deepseek_v2")
def _deepseek_v2(config: Config) -> Config:
    fill(config, rope_scaling={"factor": 1.0})
    return config


@speaks("minicpm3")
def _minicpm3(config: Config) -> Config:
    fill(config, rope_scaling={"original_max_position_embeddings": config["max_position_embeddings"]})
    return config


@speaks("qwen3_moe", "qwen3_vl_moe_text", "mellum")
def _qwen3_moe(config: Config) -> Config:
    fill(config, num_experts=config.get("num_local_experts"), mlp_only_layers=[], decoder_sparse_step=1)
    # Qwen3-VL's router knows no other way (transformers 5.23 Qwen3VLMoeTextTopKRouter).
    fill(config, norm_topk_prob=True)
    set_head_dim(config)
    return config


@speaks("qwen3_next")
def _qwen3_next(config: Config) -> Config:
    fill(config, num_experts=config.get("num_local_experts"), mlp_only_layers=[], decoder_sparse_step=1)
    config["full_attention_interval"] = sliding_period(config)
    return config


@speaks("qwen3_5_text", "qwen3_5_moe_text")
def _qwen3_5_text(config: Config) -> Config:
    text = dict(config)
    fill(text, num_experts=text.get("num_local_experts", 0))
    text["full_attention_interval"] = sliding_period(text)
    outer = {k: text[k] for k in ("architectures", "tie_word_embeddings") if k in text}
    return {**outer, "model_type": config["model_type"].removesuffix("_text"), "text_config": text}


@speaks("qwen3_5", "qwen3_5_moe")
def _qwen3_5(config: Config) -> Config:
    text = config["text_config"]
    text["tie_word_embeddings"] = bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
    config["text_config"] = _qwen3_5_text(text)["text_config"]
    return config


@speaks("glm4_moe")
def _glm4_moe(config: Config) -> Config:
    fill(config, partial_rotary_factor=0.5)
    return config


@speaks("glm4_moe_lite")
def _glm4_moe_lite(config: Config) -> Config:
    types = config.get("mlp_layer_types")
    if types:
        config["first_k_dense_replace"] = types.index("sparse") if "sparse" in types else len(types)
    return config


@speaks("kimi_linear")
def _kimi_linear(config: Config) -> Config:
    types = config["layer_types"]
    # transformers 5.23 KimiLinearForCausalLM ties nothing, whatever the config says.
    config["tie_word_embeddings"] = False
    fill(
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


@speaks("llama4_text")
def _llama4_text(config: Config) -> Config:
    outer = {k: config[k] for k in ("architectures", "tie_word_embeddings") if k in config}
    return {**outer, "model_type": "llama4", "text_config": config}


@speaks("solar_open")
def _solar_open(config: Config) -> Config:
    # No layer is dense, so the dense width is never read.
    fill(config, intermediate_size=config["moe_intermediate_size"])
    fill(config, first_k_dense_replace=0, use_qk_norm=False, partial_rotary_factor=1.0)
    return config


@speaks("glm_moe_dsa")
def _glm_moe_dsa(config: Config) -> Config:
    fill(config, topk_method="noaux_tc", scoring_func="sigmoid", moe_layer_freq=1)
    return _glm4_moe_lite(config)


@speaks("minimax_m2")
def _minimax_m2(config: Config) -> Config:
    set_head_dim(config)
    fill(
        config,
        rotary_dim=int(config["head_dim"] * config.get("partial_rotary_factor", 1.0)),
        shared_intermediate_size=0,
    )
    return config


@speaks("nemotron_h")
def _nemotron_h(config: Config) -> Config:
    # transformers 5.23 NemotronHMamba2Mixer clamps at time_step_min and does not read time_step_limit.
    config["time_step_limit"] = (config.get("time_step_min", 0.0), float("inf"))
    return config


@speaks("mimo_v2_flash")
def _mimo_v2_flash(config: Config) -> Config:
    types = config["layer_types"]
    config.setdefault("n_shared_experts", None)
    config["hybrid_layer_pattern"] = [int(t == "sliding_attention") for t in types]
    if config.get("mlp_layer_types"):
        config["moe_layer_freq"] = [int(t == "sparse") for t in config["mlp_layer_types"]]
    fill(
        config,
        # overrides.rope sets each kind's own.
        partial_rotary_factor=1.0,
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
        swa_rope_theta=theta(config, "sliding_attention", 10_000.0),
    )
    return config


@speaks("longcat_flash")
def _longcat_flash(config: Config) -> Config:
    fill(
        config,
        attention_method="MLA",
        zero_expert_type="identity",
        mla_scale_q_lora=True,
        mla_scale_kv_lora=True,
    )
    return config
