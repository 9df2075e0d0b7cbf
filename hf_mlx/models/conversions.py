"""Per model type: the reversible steps from a Hugging Face checkpoint to MLX parameters.

Types that are not named here have the same names and layouts on both sides. The HF side is what
``save_pretrained`` of transformers 5.23 writes, the MLX side mlx-lm 0.32's parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .layouts import Concat, Drop, HeadSplit, Rename, Scalar, Stack, Step, Transpose
from .weights import Checkpoint

Config = dict[str, Any]
Build = Callable[[Config, Checkpoint], tuple[Step, ...]]

_GATED = ("gate_proj", "up_proj", "down_proj")
_MIXTRAL = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_CONV1D = Transpose("{p*}.conv1d.weight")


def _experts(hf: str = "mlp.experts", mlx: str = "mlp.switch_mlp") -> tuple[Step, ...]:
    """Per-expert gate, up and down projections into one stacked module."""
    return tuple(Stack(f"{{p*}}.{hf}.{{e}}.{n}.{{kind}}", f"{{p*}}.{mlx}.{n}.{{kind}}") for n in _GATED)


def _mixtral_experts() -> tuple[Step, ...]:
    moe = "{p*}.block_sparse_moe"
    return tuple(
        Stack(f"{moe}.experts.{{e}}.{theirs}.{{kind}}", f"{moe}.switch_mlp.{ours}.{{kind}}")
        for theirs, ours in _MIXTRAL.items()
    )


def _latent_attention(config: Config, attention: str = "{p*}.self_attn") -> HeadSplit:
    return HeadSplit(
        f"{attention}.kv_b_proj.weight",
        f"{attention}.embed_q.weight",
        f"{attention}.unembed_out.weight",
        config["num_attention_heads"],
        config["qk_nope_head_dim"],
    )


def _fixed(*steps: Step) -> Build:
    return lambda config, checkpoint: steps


def _mla_experts(config: Config, checkpoint: Checkpoint) -> tuple[Step, ...]:
    return (*_experts(), _latent_attention(config))


def _granite_experts() -> tuple[Step, ...]:
    moe = "{p*}.block_sparse_moe"
    ours = tuple(f"{moe}.switch_mlp.{n}.weight" for n in ("gate_proj", "up_proj"))
    return (
        Concat(f"{moe}.input_linear.weight", ours, axis=1),
        Rename(f"{moe}.output_linear.weight", f"{moe}.switch_mlp.down_proj.weight"),
    )


def _gpt2(config: Config, checkpoint: Checkpoint) -> tuple[Step, ...]:
    linear = [Transpose(f"{{p*}}.{n}.weight", (1, 0)) for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    return (Drop("{p*}.attn.bias"), Drop("{p*}.attn.masked_bias"), *linear, Rename("transformer.{r*}", "model.{r*}"))


def _under(prefix: str) -> tuple[Step, ...]:
    """A text model that mlx-lm builds as the ``language_model`` of a multimodal one."""
    return (
        Rename(f"{prefix}.{{r*}}", "language_model.model.{r*}"),
        Rename("lm_head.{r*}", "language_model.lm_head.{r*}"),
    )


def _mistral4(config: Config, checkpoint: Checkpoint) -> tuple[Step, ...]:
    return (*_fused_experts(False, "switch_mlp"), _latent_attention(config))


def _fused_experts(transposed: bool, module: str) -> tuple[Step, ...]:
    """3-D expert tensors that transformers keeps fused: (E, 2I, H), or transposed (E, H, 2I)."""
    base = "{p*}.experts"
    ours = f"{{p*}}.{module}"
    parts = (f"{ours}.gate_proj.weight", f"{ours}.up_proj.weight")
    steps: list[Step] = [
        Concat(f"{base}.gate_up_proj", parts, axis=2 if transposed else 1),
        Rename(f"{base}.down_proj", f"{ours}.down_proj.weight"),
    ]
    if transposed:
        steps += [Transpose(f"{ours}.{n}.weight") for n in _GATED]
    return tuple(steps)


# transformers 5.23 writes Olmo Hybrid's norms under their original names, whatever the layer's kind.
OLMO_NORMS = {"attention_layer_norm": "input_layernorm", "feedforward_layer_norm": "post_attention_layernorm"}


def _olmo_hybrid(config: Config, checkpoint: Checkpoint) -> tuple[Step, ...]:
    renames = [
        Rename(name, name.replace(theirs, ours))
        for name in checkpoint.tensors
        for theirs, ours in OLMO_NORMS.items()
        if f".{theirs}." in name
    ]
    return (*renames, *(Transpose(f"{{p*}}.{n}_conv1d.weight") for n in "qkv"))


def _qwen3_5_moe(config: Config, checkpoint: Checkpoint) -> tuple[Step, ...]:
    fused = any(n.endswith(".experts.gate_up_proj") for n in checkpoint.tensors)
    experts = _fused_experts(False, "switch_mlp") if fused else _experts()
    inner = "model.language_model" if config["model_type"] == "qwen3_5_moe" else "model"
    return (Drop("model.visual.{r*}"), *_under(inner), *experts, _CONV1D)


def _qwen3_vl_moe(config: Config, checkpoint: Checkpoint) -> tuple[Step, ...]:
    # The hub's files hold (E, H, 2I), those that transformers 5 writes (E, 2I, H).
    width = 2 * config["text_config"]["moe_intermediate_size"]
    stacks = (t.shape for name, t in checkpoint.tensors.items() if name.endswith(".experts.gate_up_proj"))
    turned = any(shape[1] != width for shape in stacks)
    return (Drop("model.visual.{r*}"), *_under("model.language_model"), *_fused_experts(turned, "switch_mlp"))


# The text of these lies where mlx-lm looks for it.
_LLAVA = (Drop("vision_tower.{r*}"), Drop("multi_modal_projector.{r*}"))


def _lfm2_moe(config: Config, checkpoint: Checkpoint) -> tuple[Step, ...]:
    experts = (
        Stack(f"{{p*}}.feed_forward.experts.{{e}}.{w}.weight", f"{{p*}}.feed_forward.switch_mlp.{n}.weight")
        for w, n in _MIXTRAL.items()
    )
    dense = (Rename(f"{{p*}}.feed_forward.{w}.weight", f"{{p*}}.feed_forward.{n}.weight") for w, n in _MIXTRAL.items())
    return (*experts, *dense, Transpose("{p*}.conv.conv.weight"))


def _longcat_flash(config: Config, checkpoint: Checkpoint) -> tuple[Step, ...]:
    first, count = config["n_routed_experts"], config.get("zero_expert_num") or 0
    # Identity experts own weights in transformers that nothing reads.
    zero = (Drop(f"{{p*}}.mlp.experts.{e}.{{n}}.weight") for e in range(first, first + count))
    return (*zero, *_experts(), _latent_attention(config, "{p*}.self_attn.{i}"))


def _kimi_linear(config: Config, checkpoint: Checkpoint) -> tuple[Step, ...]:
    experts = (
        Stack(f"{{p*}}.block_sparse_moe.experts.{{e}}.{w}.weight", f"{{p*}}.mlp.switch_mlp.{n}.weight")
        for w, n in _MIXTRAL.items()
    )
    convs = [
        step
        for c in "qkv"
        for step in (
            Rename(f"{{p*}}.self_attn.{c}_conv1d.weight", f"{{p*}}.self_attn.{c}_conv.conv.weight"),
            Transpose(f"{{p*}}.self_attn.{c}_conv.conv.weight"),
        )
    ]
    # transformers 5.23 writes a dense layer's MLP under the sparse layers' name too.
    dense = [
        Rename(name, name.replace(".block_sparse_moe.", ".mlp."))
        for name in checkpoint.tensors
        if any(name.endswith(f".block_sparse_moe.{n}.weight") for n in _GATED)
    ]
    return (
        *experts,
        *dense,
        Rename("{p*}.block_sparse_moe.shared_experts.{r*}", "{p*}.mlp.shared_experts.{r*}"),
        Rename("{p*}.block_sparse_moe.gate.weight", "{p*}.mlp.gate.weight"),
        Rename("{p*}.block_sparse_moe.gate.e_score_correction_bias", "{p*}.mlp.e_score_correction_bias"),
        *convs,
        _latent_attention(config),
    )


def _dbrx(config: Config, checkpoint: Checkpoint) -> tuple[Step, ...]:
    experts = range(config["ffn_config"]["moe_num_experts"])
    split = (
        Concat(f"{{p*}}.experts.mlp.{w}", tuple(f"{{p*}}.experts.{e}.{w}.weight" for e in experts))
        for w in ("w1", "v1", "w2")
    )
    return (*split, Transpose("{p*}.experts.{e}.w2.weight", (1, 0)))


def _granitemoehybrid(config: Config, checkpoint: Checkpoint) -> tuple[Step, ...]:
    if config.get("num_local_experts"):
        return (*_granite_experts(), _CONV1D)
    return (
        Concat("{p*}.shared_mlp.input_linear.weight", ("{p*}.mlp.gate_proj.weight", "{p*}.mlp.up_proj.weight")),
        Rename("{p*}.shared_mlp.output_linear.weight", "{p*}.mlp.down_proj.weight"),
        _CONV1D,
    )


def _nemotron_h(config: Config, checkpoint: Checkpoint) -> tuple[Step, ...]:
    experts = (
        Stack(f"{{p*}}.mixer.experts.{{e}}.{theirs}.weight", f"{{p*}}.mixer.switch_mlp.{ours}.weight")
        for theirs, ours in (("up_proj", "fc1"), ("down_proj", "fc2"))
    )
    return (*experts, _CONV1D)


def _gpt_oss(config: Config, checkpoint: Checkpoint) -> tuple[Step, ...]:
    experts = "{p*}.experts"
    pair = ("gate_proj", "up_proj")
    return (
        Concat(f"{experts}.gate_up_proj", tuple(f"{experts}.{n}.weight" for n in pair), axis=2, strided=True),
        Concat(f"{experts}.gate_up_proj_bias", tuple(f"{experts}.{n}.bias" for n in pair), axis=1, strided=True),
        Rename(f"{experts}.down_proj", f"{experts}.down_proj.weight"),
        Rename(f"{experts}.down_proj_bias", f"{experts}.down_proj.bias"),
        *(Transpose(f"{experts}.{n}.weight") for n in _GATED),
    )


_LAGUNA = (
    *_experts(),
    Rename("{p*}.mlp.gate.weight", "{p*}.mlp.gate.proj.weight"),
    Rename("{p*}.mlp.experts.e_score_correction_bias", "{p*}.mlp.gate.e_score_correction_bias"),
)

CONVERSIONS: dict[str, Build] = {
    "mistral4": _mistral4,
    "opt": _fixed(Rename("model.decoder.{r*}", "model.{r*}")),
    "olmo_hybrid": _olmo_hybrid,
    "lfm2_moe": _lfm2_moe,
    "longcat_flash": _longcat_flash,
    "kimi_linear": _kimi_linear,
    "dbrx": _dbrx,
    "granitemoehybrid": _granitemoehybrid,
    "nemotron_h": _nemotron_h,
    "gpt_oss": _gpt_oss,
    "ernie4_5_moe": _fixed(
        *_experts(),
        Rename("{p*}.mlp.moe_statics.e_score_correction_bias", "{p*}.mlp.e_score_correction_bias"),
    ),
    "laguna": _fixed(*_LAGUNA),
    "exaone_moe": _fixed(
        *_experts(), Rename("{p*}.mlp.e_score_correction_bias", "{p*}.mlp.gate.e_score_correction_bias")
    ),
    "gemma4": _fixed(*_under("model.language_model")),
    "qwen3_5_text": _fixed(*_under("model"), _CONV1D),
    "qwen3_5_moe_text": _qwen3_5_moe,
    "qwen3_5_moe": _qwen3_5_moe,
    "qwen3_5": _fixed(Drop("model.visual.{r*}"), *_under("model.language_model"), _CONV1D),
    **dict.fromkeys(("llava", "mistral3"), _fixed(*_LLAVA)),
    **dict.fromkeys(("qwen2_5_vl", "qwen2_vl"), _fixed(Drop("visual.{r*}"), *_under("model"))),
    "qwen3_vl": _fixed(Drop("model.visual.{r*}"), *_under("model.language_model")),
    "qwen3_vl_moe": _qwen3_vl_moe,
    "llama4_text": _fixed(*_under("model"), *_fused_experts(True, "experts")),
    "llama4": _fixed(
        Drop("vision_model.{r*}"), Drop("multi_modal_projector.{r*}"), *_fused_experts(True, "experts")
    ),
    "apertus": _fixed(Scalar("{p*}.act_fn.alpha_p"), Scalar("{p*}.act_fn.alpha_n")),
    "lfm2": _fixed(Transpose("{p*}.conv.conv.weight")),
    "mamba": _fixed(_CONV1D),
    "falcon_mamba": _fixed(_CONV1D),
    "mamba2": _fixed(_CONV1D),
    "recurrent_gemma": _fixed(Transpose("{p*}.conv_1d.weight")),
    "mixtral": _fixed(*_mixtral_experts()),
    "phimoe": _fixed(*_mixtral_experts()),
    "minimax_m2": _fixed(*_mixtral_experts()),
    "afmoe": _fixed(*_experts(mlx="mlp.experts")),
    "dots1": _fixed(*_experts(mlx="mlp.experts")),
    "jamba": _fixed(*_experts("feed_forward.experts", "feed_forward.switch_mlp"), _CONV1D),
    "qwen3_next": _fixed(*_experts(), _CONV1D),
    "granitemoe": _fixed(*_granite_experts()),
    "gpt2": _gpt2,
    "gptj": _fixed(
        Drop("{p*}.attn.bias"), Drop("{p*}.attn.masked_bias"), Rename("transformer.{r*}", "model.{r*}")
    ),
    "gpt_neox": _fixed(
        Drop("{p*}.attention.bias"),
        Drop("{p*}.attention.masked_bias"),
        Rename("gpt_neox.{r*}", "model.{r*}"),
        Rename("model.layers.{r*}", "model.h.{r*}"),
        Rename("embed_out.{r*}", "model.embed_out.{r*}"),
    ),
    **dict.fromkeys(
        ("olmoe", "qwen2_moe", "qwen3_moe", "mellum", "glm4_moe", "solar_open", "mimo_v2_flash",
         "deepseek_v2"),
        _fixed(*_experts()),
    ),
    **dict.fromkeys(("deepseek_v3", "deepseek_v32", "glm_moe_dsa", "glm4_moe_lite"), _mla_experts),
}  # fmt: skip
