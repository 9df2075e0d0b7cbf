"""Dense models and state-space models."""

from __future__ import annotations

from .contract import Config, fill, set_head_dim, sliding_period, speaks, theta


@speaks("llama", "arcee", "bitnet", "cwm", "iquestcoder", "mistral", "ministral", "nanochat")
def _llama(config: Config) -> Config:
    # llama.py needs a full-attention layer to exist; windows are put on the blocks instead (overrides.windows).
    config["layer_types"] = ["full_attention"] * config["num_hidden_layers"]
    config["sliding_window"] = None
    fill(config, tie_word_embeddings=False)
    return config


@speaks("olmo")
def _olmo(config: Config) -> Config:
    # Built as a Llama, whose norms olmo's take the place of.
    fill(config, rms_norm_eps=1e-5)
    return _llama(config)


@speaks("smollm3")
def _smollm3(config: Config) -> Config:
    return _llama(config)


@speaks("gemma3_text")
def _gemma3_text(config: Config) -> Config:
    config["sliding_window_pattern"] = sliding_period(config)
    fill(config, rope_local_base_freq=10_000.0)
    config["rope_local_base_freq"] = theta(config, "sliding_attention", config["rope_local_base_freq"])
    return config


@speaks("gemma3")
def _gemma3(config: Config) -> Config:
    text = config["text_config"]
    # gemma3.py overwrites the text vocabulary with its own top-level default otherwise.
    fill(config, vocab_size=text.get("vocab_size", 262_208))
    text["model_type"] = "gemma3_text"
    config["text_config"] = _gemma3_text(text)
    return config


@speaks("cohere2")
def _cohere2(config: Config) -> Config:
    config["sliding_window_pattern"] = sliding_period(config)
    return config


@speaks("exaone4")
def _exaone4(config: Config) -> Config:
    set_head_dim(config)
    types = config.get("layer_types") or ["full_attention"] * config["num_hidden_layers"]
    sliding = config.get("sliding_window") is not None and "sliding_attention" in types
    period = sliding_period(config) if sliding else 0
    config["sliding_window_pattern"] = "L" * (period - 1) + "G" if sliding else None
    if not sliding:
        config["sliding_window"] = None
    return config


@speaks("exaone_moe")
def _exaone_moe(config: Config) -> Config:
    set_head_dim(config)
    types = config.get("mlp_layer_types")
    if types:
        config["is_moe_layer"] = [t == "sparse" for t in types]
    return config


@speaks("lfm2", "lfm2_moe")
def _lfm2(config: Config) -> Config:
    fill(config, block_dim=config["hidden_size"], block_ff_dim=config["intermediate_size"])
    return config


@speaks("apertus")
def _apertus(config: Config) -> Config:
    fill(config, mlp_bias=False, qk_norm=True, post_norm=False)
    return config


@speaks("gemma4_text")
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
        fill(config, **{key: value})
    config.setdefault("final_logit_softcapping", None)
    return config


@speaks("gemma4")
def _gemma4(config: Config) -> Config:
    text = config["text_config"]
    config["vocab_size"] = text.get("vocab_size", config.get("vocab_size"))
    text["model_type"] = "gemma4_text"
    config["text_config"] = _gemma4_text(text)
    return config


@speaks("gpt_neox")
def _gpt_neox(config: Config) -> Config:
    config["rotary_emb_base"] = config.get("rope_theta", 10_000.0)
    config["rotary_pct"] = config.get("partial_rotary_factor", config.get("rotary_pct", 0.25))
    return config


@speaks("gpt2")
def _gpt2(config: Config) -> Config:
    fill(config, n_ctx=config["n_positions"], num_key_value_heads=config["n_head"])
    return config


@speaks("gpt_bigcode")
def _gpt_bigcode(config: Config) -> Config:
    fill(config, n_inner=4 * config["n_embd"])
    return config


@speaks("mamba", "mamba2", "falcon_mamba")
def _mamba(config: Config) -> Config:
    fill(config, intermediate_size=int(config["expand"] * config["hidden_size"]))
    return config
