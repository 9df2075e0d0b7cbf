"""The order in which transformers registers modules, without torch.

PEFT draws its initial weights and lists its parameters in ``named_modules()`` order of the torch class.
mlx-lm registers the same modules in an order of its own (``gate, down, up`` for instance), so the order is
rebuilt here from one table of names. Names the table does not know keep mlx-lm's order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

# Siblings only: two names are compared when they hang under the same parent.
_NAMES = """
    embed_tokens wte word_embeddings embed_in embeddings embedding wpe
    layers h blocks
    temporal_block linear_attn self_attn self_attention attn attention mixer mamba
    in_proj in_proj_qkvz in_proj_qkv in_proj_z in_proj_b in_proj_a in_proj_ba
    q_proj q_a_proj q_a_layernorm q_b_proj kv_a_proj_with_mqa kv_a_layernorm kv_b_proj k_proj v_proj
    qkv_proj query_key_value c_attn o_proj out_proj dense c_proj q_norm k_norm q_layernorm k_layernorm
    block_sparse_moe shared_mlp mlp feed_forward
    gate router experts w1 w3 w2 gate_proj up_proj gate_up_proj down_proj fc1 fc2 fc_in fc_out c_fc
    dense_h_to_4h dense_4h_to_h input_linear output_linear shared_experts shared_expert shared_expert_gate
    input_layernorm post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm
    per_layer_input_gate per_layer_projection post_per_layer_input_norm
    embed_tokens_per_layer per_layer_model_projection per_layer_projection_norm
    norm ln_f final_layernorm final_layer_norm
"""
_ORDER = _NAMES.split()

# Where one class differs from the rest: these siblings, in this order.
_EXCEPTIONS: dict[str, tuple[str, ...]] = {
    "phi3": ("o_proj", "qkv_proj"),
    "gptj": ("k_proj", "v_proj", "q_proj", "out_proj"),
    "opt": ("embed_positions", "project_out", "project_in", "layers", "k_proj", "v_proj", "q_proj", "out_proj"),
    "gpt2": ("ln_1", "attn", "ln_2", "mlp", "c_attn", "c_fc", "c_proj"),
    "gpt_bigcode": ("ln_1", "attn", "ln_2", "mlp", "c_attn", "c_fc", "c_proj"),
    "starcoder2": ("c_fc", "c_proj"),
    "gpt_neox": ("input_layernorm", "post_attention_layernorm", "attention", "mlp", "query_key_value", "dense"),
    **dict.fromkeys(("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"), ("out_proj", "in_proj_qkv")),
    **dict.fromkeys(("lfm2", "lfm2_moe"), ("self_attn", "conv", "experts", "gate")),
    "olmo_hybrid": (
        *("self_attn", "mlp", "linear_attn"),
        *("q_proj", "k_proj", "v_proj", "a_proj", "b_proj", "g_proj", "o_proj"),
    ),
    "kimi_linear": (
        *("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "k_proj", "v_proj"),
        *("forget_gate", "b_proj", "g_a_proj", "g_b_proj", "o_proj", "experts", "gate"),
    ),
    "longcat_flash": ("mlp", "self_attn", "mlps", "experts", "router"),
    **dict.fromkeys(
        (
            *("deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "exaone_moe", "glm4_moe", "glm4_moe_lite"),
            *("glm_moe_dsa", "laguna", "mellum", "mimo_v2_flash", "mistral4", "qwen3_moe", "solar_open"),
        ),
        ("experts", "gate"),
    ),
    "granitemoehybrid": ("block_sparse_moe", "shared_mlp", "mamba", "self_attn"),
    **dict.fromkeys(("mamba", "falcon_mamba", "jamba"), ("in_proj", "x_proj", "dt_proj", "out_proj")),
    "nemotron_h": ("in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj", "experts", "gate"),
}
_LAST = ("lm_head", "embed_out", "output", "score")


def order_key(model_type: str, hf_paths: Iterable[str]) -> Callable[[str], tuple]:
    """A sort key that puts HF module paths into the torch class's registration order.

    Args:
        model_type: The HF config's ``model_type``.
        hf_paths: Every module path of the model, in mlx-lm's registration order.

    Returns:
        A function from a module path (or a parameter path below one) to a comparable key.
    """
    special = {name: i for i, name in enumerate(_EXCEPTIONS.get(model_type, ()))}
    known = {name: i for i, name in enumerate(_ORDER)}
    # An exception block moves as one to where its first listed name stands.
    anchor = min((known[name] for name in special if name in known), default=len(known))
    seen: dict[str, int] = {}
    for path in hf_paths:
        for part in path.split("."):
            seen.setdefault(part, len(seen))

    def rank(part: str) -> tuple:
        if part.isdigit():
            return (0, int(part), 0)
        if part in _LAST:
            return (3, _LAST.index(part), 0)
        if part in special:
            return (1, anchor, special[part])
        if part in known:
            return (1, known[part], 0)
        return (2, seen.get(part, len(seen)), 0)

    return lambda path: tuple(rank(part) for part in path.split("."))
