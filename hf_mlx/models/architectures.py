"""The three states of a model type: verified, known wrong (refused), and everything else (warned about once)."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import ModelError
from .layouts import Rename, Step
from .weights import Checkpoint

State = Literal["verified", "unknown"]
Config = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """What is known about one model type.

    Attributes:
        state: ``"verified"`` when compat_tests compare its logits and gradients with torch.
        packs: Whether rows may be packed: attention takes its mask from the cache, and only relative
            positions count.
    """

    state: State
    packs: bool = False


_PACKS = """
    afmoe apertus arcee bitnet cohere cohere2 cwm deepseek_v2 deepseek_v3 dots1 ernie4_5 ernie4_5_moe exaone4
    exaone_moe gemma gemma2 gemma3 gemma3_text gemma4 gemma4_text glm glm4 glm4_moe glm4_moe_lite gpt_neox
    gpt_oss gptj granite granitemoe helium internlm3 iquestcoder laguna llama llava mellum mimo_v2_flash
    minicpm3 minimax_m2 ministral ministral3 mistral mistral3 mixtral nanochat nemotron olmo olmo2 olmo3 olmoe
    phi phi3 qwen2 qwen2_5_vl qwen2_moe qwen2_vl qwen3 qwen3_moe qwen3_vl qwen3_vl_moe seed_oss smollm3
    solar_open stablelm starcoder2
"""
# Absolute positions, position-dependent norms, recurrent or convolutional state, chunked or sparse attention.
_ALONE = """
    deepseek_v32 falcon falcon_mamba glm_moe_dsa gpt2 gpt_bigcode granitemoehybrid hunyuan_v1_dense jamba
    kimi_linear lfm2 lfm2_moe llama4 llama4_text longcat_flash mamba mamba2 mistral4 nemotron_h olmo_hybrid opt
    qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_next
"""
VERIFIED: dict[str, Architecture] = {
    **{name: Architecture("verified", packs=True) for name in _PACKS.split()},
    **{name: Architecture("verified") for name in _ALONE.split()},
}

# Endings of parameter paths that transformers holds as buffers: router corrections, xIELU's constants, Gemma 4's scale.
BUFFERS = (".e_score_correction_bias", ".expert_bias", ".layer_scalar", ".act_fn.beta", ".act_fn.eps")

# model type → why it is refused.
KNOWN_WRONG: dict[str, str] = {
    "bailing_hybrid": "mlx-lm's module of this name reads another config and cannot be built from one of transformers",
    "dbrx": "mlx-lm reads the routing back on the host, which a compiled training step cannot do",
    "falcon_h1": "mlx-lm folds the muP multipliers into the weights, so an adapter would mean something else in PEFT",
    **dict.fromkeys(
        ("gemma3n", "gemma3n_text"),
        "mlx-lm's layers that share keys read them from a cache, and without one, as in training, make their own",
    ),
    "minimax": "mlx-lm's module of this name is MiniMax-M2 and cannot be built from a MiniMax config",
    "phimoe": "transformers samples the experts in training mode (SparseMixer), mlx-lm takes the best ones",
    "recurrent_gemma": "its logits differ from transformers' by a hundredth of the largest",
}

# Text-only types that mlx-lm builds as part of the multimodal one.
_TEXT_ONLY = {"qwen3_5_text": "qwen3_5", "qwen3_5_moe_text": "qwen3_5_moe"}

# Parts of a class name that stand for a loss over shifted labels in transformers 5.23 ``LOSS_MAPPING``.
_CAUSAL_NAMES = ("ForCausalLM", "ForConditionalGeneration")

# accepts_loss_kwargs = False on the class, transformers 5.23.
_NO_LOSS_KWARGS = """
    Gemma3nForConditionalGeneration Gemma4ForConditionalGeneration Gemma4UnifiedForConditionalGeneration
    Qwen2VLForConditionalGeneration Qwen2_5_VLForConditionalGeneration Qwen3VLForConditionalGeneration
    Qwen3VLMoeForConditionalGeneration Qwen3_5ForConditionalGeneration Qwen3_5MoeForConditionalGeneration
    Ernie4_5_VLMoeForConditionalGeneration Glm46VForConditionalGeneration Glm4vForConditionalGeneration
    Glm4vMoeForConditionalGeneration GlmOcrForConditionalGeneration Exaone4_5_ForConditionalGeneration
"""


def look_up(config: Config, folder: Path) -> Architecture:
    """Gives the architecture of a config, or says why it is refused.

    Raises:
        ModelError: Known to compute something else than transformers, has its own model code, or
            is not a model type that mlx-lm has.
    """
    model_type = config["model_type"]
    if "auto_map" in config and model_type not in VERIFIED:
        _refuse_code(config, folder)
    if model_type in KNOWN_WRONG:
        raise ModelError(
            f"{folder}: model type {model_type!r}: {KNOWN_WRONG[model_type]}",
            "a model type whose MLX code equals transformers'",
            "train it with trl.SFTTrainer; docs/architectures.md lists the types that train here",
        )
    if "model_file" in config:
        _refuse_code(config, folder)
    if model_type in VERIFIED:
        return VERIFIED[model_type]
    if not _in_mlx_lm(model_type):
        raise ModelError(
            f"{folder}: unknown model type {model_type!r}",
            "a model type that mlx-lm implements",
            "docs/architectures.md lists the types that train here; for this one use trl.SFTTrainer",
        )
    return Architecture("unknown")


def can_pack(model_type: str) -> bool:
    """Whether rows of this model type may be packed into one sequence."""
    return model_type in VERIFIED and VERIFIED[model_type].packs


def check_packs(model_type: str, received: str, remedy: str) -> None:
    """Raises where documents that share a row would see each other.

    Args:
        model_type: HF model type.
        received: What calls for packed rows.
        remedy: The corrected line.

    Raises:
        ModelError: :func:`can_pack` says no.
    """
    if not can_pack(model_type):
        raise ModelError(
            f"{received} with model type {model_type!r}",
            "a model whose attention can be kept within a document (docs/architectures.md lists them)",
            remedy,
        )


#: Types whose masks transformers 5.23 makes without ``position_ids``, from which others learn where documents begin.
_MIXED_UPSTREAM = frozenset({"afmoe", "gpt_oss"})


def note_packs(model_type: str) -> list[str]:
    """What is to be said of documents that share a row, where upstream keeps them apart with flash attention alone."""
    if model_type not in _MIXED_UPSTREAM:
        return []
    return [
        f"documents that share a row do not see each other; with {model_type!r} that is so in transformers under flash "
        "attention alone: a run with its other attention has another curve, which packing=False gives on both sides"
    ]


def accepts_loss_kwargs(config: Config) -> bool:
    """``Trainer.model_accepts_loss_kwargs`` of the class that trl builds (``config.architectures[0]``)."""
    architectures = config.get("architectures") or [""]
    return architectures[0] not in _NO_LOSS_KWARGS.split()


def counts_every_label(config: Config) -> bool:
    """Whether transformers divides the loss by all labels of a row, the first one included, which nothing predicts.

    ``Trainer._loss_shifts_labels`` (transformers 5.23) goes by the class's name: ``GPT2LMHeadModel`` has none of the
    endings that tell it of a causal loss, so its training loss comes out smaller than the mean over its targets
    (evaluation divides by the targets alone).
    """
    architectures = config.get("architectures") or []
    return bool(architectures) and not any(ending in architectures[0] for ending in _CAUSAL_NAMES)


def steps_for(config: Config, checkpoint: Checkpoint) -> tuple[Step, ...]:
    """The HF → MLX steps of a model type; none where names and layouts are the same."""
    from .conversions import CONVERSIONS

    build = CONVERSIONS.get(config["model_type"])
    return build(config, checkpoint) if build else ()


def module_renames(model_type: str) -> tuple[Rename, ...]:
    """Renames from checkpoint names to the module paths of the live HF model."""
    from .module_names import MODULES

    return MODULES.get(model_type, ())


def _in_mlx_lm(model_type: str) -> bool:
    from mlx_lm.utils import MODEL_REMAPPING

    model_type = _TEXT_ONLY.get(model_type, model_type)
    name = MODEL_REMAPPING.get(model_type, model_type)
    return name.isidentifier() and importlib.util.find_spec(f"mlx_lm.models.{name}") is not None


def _refuse_code(config: Config, folder: Path) -> None:
    raise ModelError(
        f"{folder}: model type {config['model_type']!r} comes with its own Python code "
        f"({config.get('model_file') or 'auto_map'})",
        "a model type that mlx-lm implements; code from a checkpoint is never run",
        "train it with trl.SFTTrainer(…, trust_remote_code=True); docs/architectures.md lists what trains here",
    )
