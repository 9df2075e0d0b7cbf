"""From HF's configuration objects to the frozen plan: read once, refused, checked, resolved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..errors import SettingError
from .config_tables import SFT_TABLE, ConfigTable
from .ledger import Ledger, complete_arguments, explain
from .model_plan import resolve_last_layers, resolve_lora, resolve_model
from .plan import TrainPlan
from .ranges import check_flag, check_optional_count
from .reading import read_values
from .run_plan import (
    check_logistics,
    resolve_batch,
    resolve_checkpointing,
    resolve_clip,
    resolve_optim,
    resolve_schedule,
)


def resolve_plan(
    args: Any,
    peft_config: Any = None,
    *,
    max_grad_value: float | None = None,
    finetune_last_n_layers: int | None = None,
    strict: bool = False,
    quantization_config: Any = None,
    overrides: Mapping[str, Any] | None = None,
    table: ConfigTable = SFT_TABLE,
    processes: int = 1,
    tensor_parallel: bool = False,
) -> tuple[TrainPlan, Ledger]:
    """Resolve what was asked into a plan, before an array exists.

    Args:
        args: A ``TrainingArguments`` or ``SFTConfig``, a dict of an SFTConfig's fields, or None for ``SFTConfig()``.
            A plain ``TrainingArguments`` keeps its own values and gains SFTConfig's fields at their defaults.
        peft_config: A ``LoraConfig``, or None for full fine-tuning.
        max_grad_value: Elementwise clip; see :func:`~hf_mlx.resolve_grad_clip`. None leaves it off: HF's
            ``max_grad_norm=0`` means that gradients are left alone.
        finetune_last_n_layers: Train only the last blocks, as mlx-lm's ``num_layers`` does; None or -1 is all.
        strict: Also refuse what is done another way with other numbers.
        quantization_config: TRL's constructor keyword of that name.
        overrides: Fields that keywords of the trainer set over ``args``; see
            :func:`~hf_mlx.settings.trainer_keywords.merge_trainer_keywords`.
        table: The configuration class of the trainer in question.
        processes: How many train together.
        tensor_parallel: They hold one model together, and read the same rows.

    Returns:
        The plan, and the ledger it was resolved with.

    Raises:
        SettingError: A field is refused, has a value out of range, or contradicts another one.
    """
    overrides = read_values(overrides or {}) | _quantize(args, quantization_config)
    ledger = explain(args, peft_config, overrides=overrides, table=table, processes=processes)
    ledger.raise_refused(strict=strict)
    values = complete_arguments(args, overrides, table)
    check_logistics(values)
    lora = resolve_lora(peft_config)
    plan = TrainPlan(
        batch=resolve_batch(values, 1 if tensor_parallel else processes),
        data=table.resolve_data(values),
        model=replace(resolve_model(values), scores=table.scores, tensor_parallel=processes if tensor_parallel else 1),
        optim=resolve_optim(values),
        schedule=resolve_schedule(values),
        loss=table.resolve_loss(values),
        clip=resolve_clip(values, max_grad_value),
        lora=lora,
        checkpointing=resolve_checkpointing(values),
        finetune_last_n_layers=resolve_last_layers(finetune_last_n_layers, lora),
        clear_cache_steps=check_optional_count(
            "torch_empty_cache_steps", values["torch_empty_cache_steps"], "torch_empty_cache_steps=10"
        ),
        nan_inf_filter=check_flag("logging_nan_inf_filter", values["logging_nan_inf_filter"]),
        auto_find_batch_size=check_flag("auto_find_batch_size", values["auto_find_batch_size"]),
        use_cpu=check_flag("use_cpu", values["use_cpu"]),
        full_eval_dtype="bfloat16" if check_flag("bf16_full_eval", values["bf16_full_eval"]) else None,
    )
    return plan, ledger


def _quantize(args: Any, quantization_config: Any) -> dict[str, Any]:
    if quantization_config is None:
        return {}
    kwargs = ({} if args is None else read_values(args)).get("model_init_kwargs") or {}
    if "quantization_config" in kwargs:
        raise SettingError(
            "quantization_config as a keyword of the trainer and in model_init_kwargs",
            "it is set in one place",
            "write it as the keyword, and leave it out of model_init_kwargs",
        )
    return read_values({"model_init_kwargs": dict(kwargs) | {"quantization_config": quantization_config}})
