"""What each field that ``trl.DPOConfig`` (1.16) adds does on MLX, the defaults it overrides, and its plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import SettingError
from .data_plan import resolve_length
from .plan import DataPlan, PairLossPlan
from .ranges import check_count, check_flag, check_number, check_optional_count
from .sft_config import MODEL_INIT_KWARGS, ROUTER_AUX_LOSS_COEF, TRUST_REMOTE_CODE
from .verdicts import (
    Rule,
    Values,
    adapted,
    cases,
    enabled,
    given,
    honour,
    honoured,
    ignore,
    no_op,
    one_of,
    otherwise,
    refuse,
    refused,
)

# Fields of TrainingArguments that DPOConfig gives another default (trl 1.16, _BaseConfig and DPOConfig).
DPO_DEFAULTS: Mapping[str, Any] = {
    "learning_rate": 1e-6,
    "logging_steps": 10,
    "gradient_checkpointing": True,
    "bf16": None,
}

LOSS_TYPES = (
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
)
# The others have no generalization to another divergence, since its log-partition does not cancel in them.
WITH_DIVERGENCE = frozenset({"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"})
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


def _losses(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ["sigmoid"])


def _unknown(value: Any, values: Values) -> bool:
    return not all(name in LOSS_TYPES for name in _losses(value))


# Of all trainers of pairs.
DISABLE_DROPOUT = cases(
    "disable_dropout",
    True,
    enabled(honoured("lora_dropout counts 0 while training; the saved config keeps it")),
    otherwise(adapted("drops from the same distribution, with other masks than torch's")),
)
PAD_TO_MULTIPLE_OF = honour(
    "pad_to_multiple_of", "auto", '"auto" and None round lengths to buckets, which changes no number'
)
SAMPLING = cases(
    "train_sampling_strategy",
    "random",
    one_of("random", "sequential", ruling=honoured("order of the rows")),
    one_of(
        "group_by_length",
        ruling=refused(
            "reads a column of lengths that preference rows lack (transformers raises too)",
            write='train_sampling_strategy="random"',
        ),
    ),
    otherwise(refused("is none of random, sequential", write='train_sampling_strategy="random"')),
)


DPO_CONFIG: tuple[Rule, ...] = (
    MODEL_INIT_KWARGS,
    TRUST_REMOTE_CODE,
    ROUTER_AUX_LOSS_COEF,
    DISABLE_DROPOUT,
    honour("dataset_num_proc", None, "processes that tokenize"),
    honour("max_length", 1024, "tokens kept of a prompt with its answer; with keep_start longer prompts drop the row"),
    cases(
        "truncation_mode",
        "keep_start",
        one_of("keep_start", "keep_end", ruling=honoured("which end of a long row is kept")),
        otherwise(refused("is none of keep_start, keep_end", write='truncation_mode="keep_start"')),
    ),
    cases(
        "padding_free",
        False,
        enabled(no_op("is unavailable in this version of TRL too, which goes back to padding")),
        otherwise(honoured("off")),
    ),
    PAD_TO_MULTIPLE_OF,
    honour("precompute_ref_log_probs", False, "the reference is computed once, before training"),
    honour("precompute_ref_batch_size", None, "pairs at once while the reference is precomputed"),
    cases(
        "loss_type",
        ["sigmoid"],
        given(
            f"a name that is none of {', '.join(LOSS_TYPES)}",
            _unknown,
            refused("names a loss that TRL does not have", write='loss_type=["sigmoid"]'),
        ),
        otherwise(honoured("all of TRL's losses, and mixes of them")),
    ),
    honour("loss_weights", None, "one for each loss_type; None is 1.0 each"),
    honour("ld_alpha", None, "weight of the tokens past the shorter answer of a pair"),
    cases(
        "f_divergence_type",
        "reverse_kl",
        one_of(*DIVERGENCES, ruling=honoured("what keeps the policy near its reference")),
        otherwise(refused(f"is none of {', '.join(DIVERGENCES)}", write='f_divergence_type="reverse_kl"')),
    ),
    honour("f_alpha_divergence_coef", 0.5, "of alpha_divergence"),
    honour("label_smoothing", 0.0, "of robust, exo_pair and the aot losses"),
    honour("beta", 0.1, "how far the policy may move from its reference"),
    honour("use_weighting", False, "WPO's weights of pairs"),
    honour("discopop_tau", 0.05, "of discopop"),
    ignore("activation_offloading", False, "has no place to offload to in unified memory"),
    cases(
        "sync_ref_model",
        False,
        given(
            "True, with precompute_ref_log_probs=True",
            lambda value, values: bool(value and values["precompute_ref_log_probs"]),
            refused("moves a reference that was read before training (TRL raises too)", write="sync_ref_model=False"),
        ),
        enabled(honoured("the reference follows the policy; without an adapter only, as in TRL")),
        otherwise(honoured("off")),
    ),
    honour("ref_model_mixup_alpha", 0.6, "how far the reference goes towards the policy at each sync"),
    honour("ref_model_sync_steps", 512, "steps between two syncs"),
    honour("pad_token", None, "must be in the vocabulary"),
    # Fields of TrainingArguments that mean something else under this trainer.
    ignore("label_smoothing_factor", 0.0, "is not read by TRL's preference loss; label_smoothing is"),
    refuse(
        "neftune_noise_alpha",
        None,
        "would put noise on the reference too, as TRL does, from another random stream",
        write="neftune_noise_alpha=None",
    ),
    refuse(
        "bf16_full_eval",
        False,
        "would cast the policy and not its reference",
        write="bf16_full_eval=False",
    ),
    refuse("batch_eval_metrics", False, "calls compute_metrics once a batch", write="batch_eval_metrics=False"),
    refuse("include_for_metrics", [], "hands compute_metrics the pairs' inputs", write="include_for_metrics=[]"),
    SAMPLING,
)  # fmt: skip


def resolve_multiple(multiple: Any) -> int | None:
    """``pad_to_multiple_of``: ``"auto"`` is no padding but on Neuron."""
    if multiple in (None, "auto"):
        return None
    return check_count("pad_to_multiple_of", multiple, "pad_to_multiple_of=8")


def resolve_pair_data(values: Mapping[str, Any]) -> DataPlan:
    """Truncation, padding and processes."""
    return DataPlan(
        max_length=resolve_length(values["max_length"]),
        truncation_mode=values["truncation_mode"],
        pad_to_multiple_of=resolve_multiple(values["pad_to_multiple_of"]),
        pad_token=values["pad_token"],
        dataset_num_proc=check_optional_count("dataset_num_proc", values["dataset_num_proc"], "dataset_num_proc=4"),
        seed=int(values["seed"]),
    )


def resolve_pair_loss(values: Mapping[str, Any]) -> PairLossPlan:
    """What preference training minimises.

    Raises:
        SettingError: A number is out of range, or two settings contradict each other.
    """
    names = _losses(values["loss_type"])
    weights = values["loss_weights"] or [1.0] * len(names)
    if len(weights) != len(names):
        raise SettingError(
            f"loss_weights={weights!r} with loss_type={names!r}",
            "one weight for each loss",
            f"write loss_weights={[1.0] * len(names)!r}",
        )
    coefficient, alpha = values["router_aux_loss_coef"], values["ld_alpha"]
    plan = PairLossPlan(
        losses=tuple(
            (name, check_number("loss_weights", weight, "loss_weights=None", low=float("-inf")))
            for name, weight in zip(names, weights, strict=True)
        ),
        beta=check_number("beta", values["beta"], "beta=0.1"),
        label_smoothing=check_number("label_smoothing", values["label_smoothing"], "label_smoothing=0.1", below=1.0),
        discopop_tau=check_number("discopop_tau", values["discopop_tau"], "discopop_tau=0.05", above=0.0),
        f_divergence_type=values["f_divergence_type"],
        f_alpha_divergence_coef=check_number(
            "f_alpha_divergence_coef", values["f_alpha_divergence_coef"], "f_alpha_divergence_coef=0.5",
            low=float("-inf"),
        ),
        ld_alpha=None if alpha is None else check_number("ld_alpha", alpha, "ld_alpha=0.5"),
        use_weighting=check_flag("use_weighting", values["use_weighting"]),
        router_aux_loss_coef=None
        if coefficient is None
        else check_number("router_aux_loss_coef", coefficient, "router_aux_loss_coef=0.001"),
        disable_dropout=check_flag("disable_dropout", values["disable_dropout"]),
        precompute=check_flag("precompute_ref_log_probs", values["precompute_ref_log_probs"]),
        precompute_batch_size=check_optional_count(
            "precompute_ref_batch_size", values["precompute_ref_batch_size"], "precompute_ref_batch_size=8"
        ),
        sync_steps=check_count("ref_model_sync_steps", values["ref_model_sync_steps"], "ref_model_sync_steps=512")
        if check_flag("sync_ref_model", values["sync_ref_model"])
        else None,
        mixup_alpha=check_number("ref_model_mixup_alpha", values["ref_model_mixup_alpha"], "ref_model_mixup_alpha=0.6"),
    )  # fmt: skip
    _check_together(plan)
    return plan


def _check_together(plan: PairLossPlan) -> None:
    names = [name for name, _ in plan.losses]
    without = [name for name in names if name not in WITH_DIVERGENCE]
    if plan.f_divergence_type != "reverse_kl" and without:
        raise SettingError(
            f"f_divergence_type={plan.f_divergence_type!r} with loss_type={names!r}",
            f"another divergence goes with {', '.join(sorted(WITH_DIVERGENCE))} only (TRL raises too)",
            'write f_divergence_type="reverse_kl"',
        )
    if "exo_pair" in names and plan.label_smoothing == 0:
        raise SettingError(
            "loss_type exo_pair with label_smoothing=0.0",
            "exo_pair takes the logarithm of label_smoothing (TRL raises too)",
            "write label_smoothing=1e-3",
        )
    if "robust" in names and plan.label_smoothing == 0.5:
        raise SettingError(
            "loss_type robust with label_smoothing=0.5",
            "robust divides by 1 - 2 * label_smoothing",
            "write label_smoothing=0.1",
        )
    if any(name in ("ipo", "sppo_hard") for name in names) and plan.beta == 0:
        raise SettingError(f"beta=0.0 with loss_type={names!r}", "a loss that divides by beta", "write beta=0.1")
    barred = [name for name in names if name in ("aot", "aot_unpaired", "sft")]
    if plan.use_weighting and barred:
        raise SettingError(
            f"use_weighting=True with loss_type={barred[0]!r}",
            "WPO weighs pair by pair, and this loss is not a sum over pairs (TRL raises too)",
            "write use_weighting=False",
        )
