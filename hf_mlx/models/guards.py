"""Options that a config switches on and mlx-lm would not compute: refused by name, never dropped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import ModelError
from .activations import check_activation
from .bitsandbytes import is_four_bit
from .config import FILES
from .weights import Checkpoint

Config = dict[str, Any]

# mlx-lm code that builds a plain rotary embedding whatever rope_scaling says.
_ROPE_PLAIN = """
    cohere cohere2 gemma gemma2 glm glm4 gpt_neox helium hunyuan_v1_dense lfm2 lfm2_moe mixtral nemotron olmo3
    phi phimoe qwen2_moe qwen3_moe recurrent_gemma stablelm starcoder2 jamba dbrx glm4_moe minimax_m2
    mimo_v2_flash solar_open qwen3_5 qwen3_5_moe qwen3_vl_moe ernie4_5 ernie4_5_moe olmo_hybrid
"""
# Types whose code computes some rope types, but not these.
_ROPE_UNKNOWN = {
    "deepseek_v2": ("linear", "llama3", "longrope"),
    **dict.fromkeys(("deepseek_v3", "deepseek_v32", "glm_moe_dsa", "glm4_moe_lite", "longcat_flash"), ("longrope",)),
    **dict.fromkeys(("falcon", "nanochat", "smollm3"), ("longrope",)),
    "mellum": ("linear",),
    "minicpm3": ("linear", "llama3", "yarn"),
    "ministral3": ("linear", "llama3"),
    "mistral4": ("linear", "llama3", "longrope"),
    **dict.fromkeys(("llama4", "llama4_text"), ("longrope",)),
}
# Rope types that mlx-lm 0.32 rope_utils.initialize_rope computes as transformers 5.23 does.
_ROPE_KNOWN = frozenset({"default", "linear", "llama3", "yarn", "longrope", "proportional", "su", "deepseek_yarn"})
# Base-model dropout, which trl's trainer leaves active in training mode and mlx-lm has no code for.
_DROPOUTS = (
    "attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "hidden_dropout", "residual_dropout",
    "embedding_dropout", "dropout", "attn_dropout", "ffn_dropout_rate", "activation_dropout", "emb_dropout_prob",
    "layerdrop",
)  # fmt: skip
_NOISES = ("router_jitter_noise", "input_jitter_noise", "moe_jitter_eps")
# (model type, key) → the values mlx-lm's code computes; another value is refused.
_FIXED: dict[tuple[str, str], tuple[Any, ...]] = {
    ("gemma3_text", "attn_logit_softcapping"): (None,),
    ("gemma3_text", "final_logit_softcapping"): (None,),
    ("gemma3_text", "use_bidirectional_attention"): (None, False),
    ("gpt2", "scale_attn_by_inverse_layer_idx"): (None, False),
    ("gpt2", "scale_attn_weights"): (None, True),
    ("gpt_bigcode", "scale_attn_weights"): (None, True),
    ("qwen2_moe", "norm_topk_prob"): (None, False),
    ("olmo", "clip_qkv"): (None,),
    ("olmoe", "clip_qkv"): (None,),
    ("ministral3", "sliding_window"): (None,),
    ("llama4_text", "num_experts_per_tok"): (None, 1),
}

# Types whose weights of the chosen experts mlx-lm divides by their sum only where there are several.
_LONE_EXPERTS = """
    afmoe deepseek_v3 deepseek_v32 dots1 exaone_moe glm4_moe glm4_moe_lite glm_moe_dsa kimi_linear mimo_v2_flash
    nemotron_h solar_open
"""


# Multimodal types whose text may be of several types → those that mlx-lm builds as such.
_TEXTS = {"llava": ("llama", "mistral"), "mistral3": ("ministral3", "mistral")}


def check_config(config: Config, folder: Path) -> None:
    """Raises for every option in ``config`` that training on MLX would not honour.

    Raises:
        ModelError: Names the key, its value, and what to do.
    """
    nested = config.get("text_config")
    text: Config = nested if isinstance(nested, dict) else config
    kinds = _TEXTS.get(config["model_type"])
    if kinds and text.get("model_type") not in kinds:
        remedy = f"a text model of type {' or '.join(kinds)}; train this checkpoint with trl.SFTTrainer"
        raise _option(folder, "text_config.model_type", text.get("model_type"), remedy)
    check_activation(config["model_type"], text, folder)
    _check_rope(config["model_type"], text, folder)
    _check_quantizer(config, folder)
    random = {key: text.get(key) for key in (*_DROPOUTS, *_NOISES)}
    random = {key: value for key, value in random.items() if isinstance(value, int | float) and value > 0}
    if random:
        zeros = ", ".join(f"{key}=0.0" for key in random)
        raise ModelError(
            f"{folder}: config.json has {', '.join(f'{key}={value!r}' for key, value in random.items())}",
            "a base without random noise of its own (mlx-lm has no code for it)",
            f"set {', '.join(random)} to 0.0 in config.json, or hand over the model: "
            f"AutoModelForCausalLM.from_pretrained(…, {zeros}); LoraConfig(lora_dropout=…) works",
        )
    _check_layers_of_a_kind(config["model_type"], text, folder)
    chosen = text.get("num_experts_per_tok", text.get("num_experts_per_token"))
    divides = text.get("norm_topk_prob", text.get("moe_renormalize", text.get("route_norm", True)))
    lone = chosen == 1 and divides
    if lone and config["model_type"] in _LONE_EXPERTS.split():
        raise _option(folder, "num_experts_per_tok", 1, "set norm_topk_prob to false (its weight is then no longer 1)")
    _check_groups(text, folder)
    if text.get("sliding_window") == 0 and "sliding_attention" in (text.get("layer_types") or ()):
        raise _option(folder, "sliding_window", 0, "use_sliding_window=True with a window, or no sliding layer_types")
    _check_widths(config["model_type"], text, folder)
    for (model_type, key), allowed in _FIXED.items():
        if model_type in (config["model_type"], text.get("model_type")) and text.get(key) not in allowed:
            raise _option(folder, key, text.get(key), "train this checkpoint with trl.SFTTrainer")


def _check_widths(model_type: str, config: Config, folder: Path) -> None:
    """Latent attention whose widths mlx-lm derives from others."""
    width, head = config.get("v_head_dim"), config.get("head_dim")
    if model_type == "minicpm3" and config.get("q_lora_rank") is None:
        raise _option(folder, "q_lora_rank", None, "queries of a low rank, or trl.SFTTrainer")
    if model_type == "minicpm3" and width != config["hidden_size"] // config["num_attention_heads"]:
        raise _option(folder, "v_head_dim", width, "hidden_size / num_attention_heads, or trl.SFTTrainer")
    if model_type == "mistral4" and head not in (None, config["qk_nope_head_dim"] + config["qk_rope_head_dim"]):
        raise _option(folder, "head_dim", head, "qk_nope_head_dim + qk_rope_head_dim, or trl.SFTTrainer")


def check_layers(config: Config, checkpoint: Checkpoint, folder: Path) -> None:
    """Refuse a config of more layers than there are tensors, before a loop makes them.

    Raises:
        ModelError: Names the key.
    """
    for part in (config, config.get("text_config")):
        for key in ("num_hidden_layers", "n_layer", "n_layers"):
            layers = part.get(key) if isinstance(part, dict) else None
            if isinstance(layers, int) and layers > len(checkpoint.tensors):
                raise FILES.refuse(
                    folder / "config.json",
                    f"{key}={layers}, where the files hold {len(checkpoint.tensors)} tensors",
                    "the config that was saved with these weights",
                )


def _check_layers_of_a_kind(model_type: str, config: Config, folder: Path) -> None:
    types = config.get("layer_types") or []
    if model_type.startswith("llama4"):
        if config.get("num_hidden_layers", 48) < 4:
            raise _option(folder, "num_hidden_layers", config["num_hidden_layers"], "a Llama 4 of at least 4 layers")
        # mlx-lm's code has the period of the published models built in.
        turns = [int((layer + 1) % 4 != 0) for layer in range(config.get("num_hidden_layers", 48))]
        kinds = ["chunked_attention" if turn else "full_attention" for turn in turns]
        for key, wanted in (("no_rope_layers", turns), ("layer_types", kinds)):
            if (config.get(key) or wanted) != wanted:
                raise _option(folder, key, config[key], "train this checkpoint with trl.SFTTrainer")
    # In transformers a window that no layer has still takes the rotary embedding from the others.
    if model_type.startswith("exaone") and config.get("sliding_window") and types and "sliding_attention" not in types:
        raise _option(folder, "layer_types", types, "sliding_window=null, or at least one layer of sliding_attention")
    if model_type == "kimi_linear" and "linear_attention" not in types:
        raise _option(folder, "layer_types", types, "at least one layer of linear_attention, or trl.SFTTrainer")


def _check_groups(config: Config, folder: Path) -> None:
    """Where the kept groups hold fewer experts than a token gets, which others it gets is left to the sort."""
    groups, kept, chosen = (config.get(key) or 0 for key in ("n_group", "topk_group", "num_experts_per_tok"))
    experts: int = config.get("n_routed_experts") or config.get("num_experts") or config.get("num_local_experts") or 0
    if groups > kept > 0 and chosen > kept * (experts // groups):
        remedy = f"topk_group of at least {-(-chosen * groups // experts)}, or trl.SFTTrainer"
        raise _option(folder, "topk_group", kept, remedy)


def _check_rope(model_type: str, config: Config, folder: Path) -> None:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    # Gemma 3's windowed layers always get a plain rotary embedding.
    if model_type in ("gemma3", "gemma3_text") and isinstance(window := rope.get("sliding_attention"), dict):
        kind = window.get("rope_type", "default")
        if kind != "default":
            raise _option(folder, "rope_type", kind, "train this checkpoint with trl.SFTTrainer")
    for entry in [rope, *(v for v in rope.values() if isinstance(v, dict))]:
        kind = entry.get("rope_type", entry.get("type", "default"))
        types = (model_type, config.get("model_type", model_type))
        plain = kind != "default" and any(name in _ROPE_PLAIN.split() for name in types)
        # overrides.rope sets one for all layers.
        plain |= entry is not rope and kind in ("longrope", "su")
        plain |= kind == "proportional" and not model_type.startswith("gemma4")
        known = kind in _ROPE_KNOWN and not plain and all(kind not in _ROPE_UNKNOWN.get(name, ()) for name in types)
        if not known:
            raise _option(folder, "rope_type", kind, "train this checkpoint with trl.SFTTrainer")
        part, width = entry.get("partial_rotary_factor"), config.get("head_dim")
        if model_type == "mimo_v2_flash" and entry is not rope:
            part = part or 0.334
        if model_type == "glm4_moe_lite" and part not in (None, 1.0):
            raise _option(folder, "partial_rotary_factor", part, "train this checkpoint with trl.SFTTrainer")
        if part and width and "qk_rope_head_dim" not in config and int(width * part) % 2:
            raise _option(folder, "partial_rotary_factor", part, f"a part of the {width} features that is even")


def _check_quantizer(config: Config, folder: Path) -> None:
    quantizer = config.get("quantization_config")
    if not isinstance(quantizer, dict) or config.get("quantization") or is_four_bit(config):
        return
    if "bitsandbytes" in str(quantizer.get("quant_method")):
        raise ModelError(
            f"{folder}: weights of LLM.int8(), which multiplies rounded activations (bitsandbytes, load_in_8bit)",
            "4-bit weights of bitsandbytes, or weights in floating point",
            "pass the unquantised base and quantization_config=BitsAndBytesConfig(load_in_8bit=True): "
            "it is quantised here on loading",
        )
    # mlx-lm unpacks some of these, but neither its numbers nor the way back have been compared with transformers.
    raise ModelError(
        f"{folder}: weights quantised by {quantizer.get('quant_method')!r}",
        "floating-point weights, or a folder that mlx_lm.convert quantised",
        "pass the unquantised base and quantization_config=BitsAndBytesConfig(load_in_4bit=True): "
        "it is quantised here on loading",
    )


def _option(folder: Path, key: str, value: object, remedy: str) -> ModelError:
    return ModelError(f"{folder}: config.json has {key}={value!r}", "an option that mlx-lm computes", remedy)
