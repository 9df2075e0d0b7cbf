"""Tables that PEFT 0.21 carries beside its code, for the architectures mlx-lm knows.

Source: ``peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING`` and
``peft.utils.transformers_weight_conversion``; a compatibility test compares them with the installed PEFT.
"""

from __future__ import annotations

_QV = ("q_proj", "v_proj")

# model_type → target_modules that PEFT takes when LoraConfig(target_modules=None).
_QV_TYPES = "opt gptj llama llama4 mistral mixtral stablelm gemma gemma2 gemma3_text qwen2 qwen3"
TARGET_MODULES: dict[str, tuple[str, ...] | str] = {
    **dict.fromkeys(_QV_TYPES.split(), _QV),
    "gpt2": ("c_attn",),
    "gpt_bigcode": ("c_attn",),
    **dict.fromkeys(("falcon", "gpt_neox"), ("query_key_value",)),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "rwkv7": ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"),
}

# Mixture-of-experts types whose per-expert keys PEFT fuses again when it loads an adapter.
_GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")
_W123 = ("w1", "w3", "w2")
_GATE_UP_DOWN_TYPES = """
    afmoe cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 dots1 ernie4_5_moe exaone_moe flex_olmo glm4_moe
    glm4_moe_lite glm_moe_dsa hunyuan_v1_moe mellum olmoe qwen3_moe qwen3_next solar_open
"""
EXPERT_NAMES: dict[str, tuple[str, str, str]] = {
    **dict.fromkeys(("mixtral", "minimax", "minimax_m2"), _W123),
    **dict.fromkeys(_GATE_UP_DOWN_TYPES.split(), _GATE_UP_DOWN),
}

# Types whose gate and up projection take turns in the rows of the fused parameter.
INTERLEAVED_TYPES = ("gpt_oss",)

# Types whose stacks PEFT reads the wrong way round (no ``is_transposed`` on the class): A meets the outputs there.
TURNED_TYPES = ("llama4", "llama4_text")

# The names that PEFT turns into parameters: those of the experts, and of LongCat's, whose keys do not come back here.
REWRITTEN_NAMES: dict[str, tuple[str, ...]] = {**EXPERT_NAMES, "longcat_flash": _GATE_UP_DOWN}

# Linear layers whose own forward PEFT's wrapper does not serve: Llama 4's router gives back two tensors.
UNWRAPPED_MODULES: dict[str, tuple[str, ...]] = dict.fromkeys(("llama4", "llama4_text"), ("router",))

# Modules of state-space layers that PEFT refuses (``_check_lora_target_modules_mamba``).
BYPASSED_MODULES: dict[str, tuple[str, ...]] = dict.fromkeys(
    ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"), ("out_proj", "conv1d")
)

# Modules whose weight torch reads past the adapter that PEFT puts around it: its pair never gets a gradient.
IDLE_MODULES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("jamba", "mamba", "falcon_mamba"), ("dt_proj",)),
    "longcat_flash": ("classifier",),
}

# Model types whose linear layers are transformers' Conv1D, stored (in, out).
CONV1D_TYPES = ("gpt2",)

# Modules that the torch model names differently from its checkpoint: a PEFT key would miss them.
RENAMED_MODULES: dict[str, tuple[str, ...]] = {"gpt_neox": ("embed_out",)}

# Modules whose keys PEFT renames amiss when it loads an adapter, one of its own included (a pattern for
# ``mlp.shared_expert.`` whose dots match anything, transformers 5.23 ``conversion_mapping``).
LOST_ON_LOADING: dict[str, str] = {"laguna": "shared_experts"}

# Endings of the parameters for whose values ``from_pretrained`` of transformers 5.23 draws from torch's generator,
# one draw an element, before it reads them from the file (``_init_weights`` of the linear-attention classes).
DRAWN_ON_LOADING: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("mamba", "falcon_mamba"), (".mixer.D",)),
    "mamba2": (".mixer.dt_bias",),
    "olmo_hybrid": (".linear_attn.A_log", ".linear_attn.dt_bias"),
    **dict.fromkeys(
        ("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next"), (".linear_attn.A_log",)
    ),
}

# Multimodal types for which AutoModelForCausalLM builds a text-only class with other module paths than the class that
# trl builds from ``architectures``, whose paths are the checkpoint's.
SPLIT_TYPES = ("llama4", "qwen3_5", "qwen3_5_moe")
