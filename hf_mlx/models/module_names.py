"""Per model type: where the live transformers model has other module paths than its checkpoint has names."""

from __future__ import annotations

from .conversions import OLMO_NORMS
from .layouts import Rename

# Checkpoint name → path in the live transformers 5.23 model, where the two differ.
MODULES: dict[str, tuple[Rename, ...]] = {
    **dict.fromkeys(("mixtral", "minimax_m2"), (Rename("{p*}.block_sparse_moe.{r*}", "{p*}.mlp.{r*}"),)),
    **dict.fromkeys(
        ("granitemoe", "granitemoehybrid"),
        (
            Rename("{p*}.block_sparse_moe.input_linear.weight", "{p*}.block_sparse_moe.experts.gate_up_proj"),
            Rename("{p*}.block_sparse_moe.output_linear.weight", "{p*}.block_sparse_moe.experts.down_proj"),
            Rename("{p*}.block_sparse_moe.router.layer.{r*}", "{p*}.block_sparse_moe.router.{r*}"),
        ),
    ),
    **dict.fromkeys(
        ("gemma3", "llava", "mistral3"),
        (
            Rename("language_model.model.{r*}", "model.language_model.{r*}"),
            Rename("language_model.lm_head.{r*}", "lm_head.{r*}"),
        ),
    ),
    **dict.fromkeys(("qwen2_5_vl", "qwen2_vl"), (Rename("model.{r*}", "model.language_model.{r*}"),)),
    "olmo_hybrid": tuple(Rename(f"{{p*}}.{a}.weight", f"{{p*}}.{b}.weight") for a, b in OLMO_NORMS.items()),
    "nemotron_h": (Rename("backbone.{r*}", "model.{r*}"),),
    "laguna": (Rename("{p*}.mlp.shared_expert.{r*}", "{p*}.mlp.shared_experts.{r*}"),),
    "kimi_linear": (
        Rename("{p*}.self_attn.f_a_proj.{r*}", "{p*}.self_attn.forget_gate.f_a_proj.{r*}"),
        Rename("{p*}.self_attn.f_b_proj.{r*}", "{p*}.self_attn.forget_gate.f_b_proj.{r*}"),
        Rename("{p*}.block_sparse_moe.{r*}", "{p*}.mlp.{r*}"),
    ),
}
