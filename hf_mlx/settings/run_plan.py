"""How the run is batched, optimised, scheduled and clipped: the arithmetic settings, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..errors import SettingError
from .clipping import GradClip, resolve_grad_clip
from .optimizers import ALGORITHMS, parse_optim_args
from .plan import BatchPlan, CheckpointingPlan, LossPlan, OptimPlan, SchedulePlan
from .ranges import check_count, check_flag, check_interval, check_number, check_optional_count, check_text
from .schedules import STEPPED_BY_METRIC, check_options

_ROWS = 2**31  # MLX counts an array's rows in int32
_SEEDS = 2**32  # numpy's range, which transformers.set_seed seeds as well


def resolve_batch(values: Mapping[str, Any], processes: int = 1) -> BatchPlan:
    """Order, batch sizes, accumulation and length of the run, on so many processes."""
    max_steps, epochs = _resolve_length(values)
    accelerator = values["accelerator_config"] or {}
    plan = BatchPlan(
        train_batch_size=_count(values, "per_device_train_batch_size", "per_device_train_batch_size=1", below=_ROWS),
        eval_batch_size=_count(values, "per_device_eval_batch_size", "per_device_eval_batch_size=1", below=_ROWS),
        gradient_accumulation_steps=_resolve_accumulation(values, accelerator),
        num_train_epochs=epochs,
        max_steps=max_steps,
        drop_last=check_flag("dataloader_drop_last", values["dataloader_drop_last"]),
        seed=check_count("seed", values["seed"], "seed=42", low=0, below=_SEEDS),
        data_seed=check_optional_count("data_seed", values["data_seed"], "data_seed=None, which follows seed", low=0),
        sampling=values["train_sampling_strategy"],
        seedable_sampler=check_flag("use_seedable_sampler", accelerator.get("use_seedable_sampler", True)),
        length_column_name=check_text(
            "length_column_name", values["length_column_name"], 'length_column_name="length"'
        ),
        processes=processes,
        split_batches=processes > 1 and check_flag("split_batches", accelerator.get("split_batches", False)),
        average_tokens=check_flag("average_tokens_across_devices", values["average_tokens_across_devices"]),
    )
    check_split(plan, "train", plan.train_batch_size)
    return plan


def check_split(plan: BatchPlan, kind: str, rows: int) -> None:
    """Refuse batches that cannot be dealt to all processes (accelerate 1.15 ``prepare_data_loader``).

    Args:
        plan: Its ``split_batches`` and ``processes`` are read.
        kind: ``"train"`` or ``"eval"``.
        rows: Of a batch. One row passes accelerate's check, and then nobody has a row.

    Raises:
        SettingError: They cannot.
    """
    if plan.split_batches and rows % plan.processes:
        raise SettingError(
            f"per_device_{kind}_batch_size={rows} with split_batches on {plan.processes} processes",
            "batches that can be dealt to all of them",
            f"per_device_{kind}_batch_size={max(rows // plan.processes, 1) * plan.processes}, or "
            'accelerator_config={"split_batches": False}',
        )


def _resolve_length(values: Mapping[str, Any]) -> tuple[int, float]:
    max_steps = check_count("max_steps", values["max_steps"], "max_steps=-1 to count epochs", low=-(2**63))
    if max_steps == 0:
        raise SettingError(
            "max_steps=0",
            "max_steps is positive, or negative to count epochs; upstream takes 0 for 'not set' and trains all epochs",
            "write max_steps=1, or max_steps=-1 with num_train_epochs",
        )
    if max_steps > 0:
        # Not read then; scripts write -1.
        epochs = values["num_train_epochs"]
        return max_steps, check_number("num_train_epochs", epochs, "num_train_epochs=3.0", low=-math.inf)
    remedy = "num_train_epochs=3.0, or max_steps=100"
    return -1, check_number("num_train_epochs", values["num_train_epochs"], remedy, above=0.0)


def _resolve_accumulation(values: Mapping[str, Any], accelerator: Mapping[str, Any]) -> int:
    # transformers 5.23, Trainer.create_accelerator_and_postprocess: num_steps counts when the field is left at 1.
    steps = _count(values, "gradient_accumulation_steps", "gradient_accumulation_steps=1")
    nested = (accelerator.get("gradient_accumulation_kwargs") or {}).get("num_steps")
    if nested is None:
        return steps
    if steps > 1:
        raise SettingError(
            f"gradient_accumulation_steps={steps} and accelerator_config's num_steps={nested!r}",
            "accumulation is set in one place",
            f"write gradient_accumulation_steps={steps}, and no num_steps in gradient_accumulation_kwargs",
        )
    return check_count("num_steps in gradient_accumulation_kwargs", nested, "num_steps=1")


def resolve_optim(values: Mapping[str, Any]) -> OptimPlan:
    """The algorithm and its numbers."""
    name = ALGORITHMS[values["optim"]]
    return OptimPlan(
        name=name,
        learning_rate=_number(values, "learning_rate", "learning_rate=2e-4"),
        weight_decay=_number(values, "weight_decay", "weight_decay=0.01"),
        adam_beta1=_number(values, "adam_beta1", "adam_beta1=0.9", below=1.0),
        adam_beta2=_number(values, "adam_beta2", "adam_beta2=0.999", below=1.0),
        adam_epsilon=_number(values, "adam_epsilon", "adam_epsilon=1e-8"),
        options=parse_optim_args(values["optim_args"], name),
    )


def resolve_schedule(values: Mapping[str, Any]) -> SchedulePlan:
    """The schedule, its warmup as the user wrote it, and its options."""
    name = values["lr_scheduler_type"]
    options = check_options(name, values["lr_scheduler_kwargs"])
    _check_floor(name, options, values["learning_rate"])
    if name in STEPPED_BY_METRIC and values["eval_strategy"] == "no":
        raise SettingError(
            f"lr_scheduler_type={name!r} with eval_strategy='no'",
            f"{name} follows the evaluation metric",
            'write eval_strategy="epoch" and pass an eval_dataset',
        )
    warmup = _number(values, "warmup_steps", "warmup_steps=0.03 for a share, warmup_steps=10 for steps")
    return SchedulePlan(name=name, warmup_steps=warmup if warmup < 1 else math.floor(warmup), options=options)


def _check_floor(name: str, options: Mapping[str, Any], rate: float) -> None:
    end = options.get("lr_end", 1e-7)
    if name == "polynomial" and not end < rate:
        raise SettingError(
            f"learning_rate={rate!r} with lr_end={end!r}",
            "polynomial falls from learning_rate to lr_end, so learning_rate > lr_end (transformers raises too)",
            f'write lr_scheduler_kwargs={{"lr_end": {rate / 10!r}}}, or a larger learning_rate',
        )
    if options.get("min_lr") is not None and name not in STEPPED_BY_METRIC and not rate:
        raise SettingError(
            f"learning_rate={rate!r} with min_lr={options['min_lr']!r}",
            f"{name} divides min_lr by learning_rate, so learning_rate > 0",
            "write learning_rate=2e-4",
        )


def resolve_loss(values: Mapping[str, Any]) -> LossPlan:
    """What is minimised."""
    coefficient, alpha = values["router_aux_loss_coef"], values["neftune_noise_alpha"]
    return LossPlan(
        kind="dft" if values["loss_type"] == "dft" else "nll",
        label_smoothing_factor=_number(values, "label_smoothing_factor", "label_smoothing_factor=0.1", below=1.0),
        neftune_noise_alpha=None if alpha is None else _number(values, "neftune_noise_alpha", "neftune_noise_alpha=5"),
        router_aux_loss_coef=None
        if coefficient is None
        else _number(values, "router_aux_loss_coef", "router_aux_loss_coef=0.001"),
    )


def resolve_clip(values: Mapping[str, Any], max_grad_value: float | None) -> GradClip:
    """HF's ``max_grad_norm=0`` means off, so the elementwise default is left to MLX-native callers."""
    return resolve_grad_clip(values["max_grad_norm"], 0.0 if max_grad_value is None else max_grad_value)


def resolve_checkpointing(values: Mapping[str, Any]) -> CheckpointingPlan:
    """Activation checkpointing under either of its two names."""
    kwargs = values["activation_checkpointing_kwargs"] or {}
    return CheckpointingPlan(
        enabled=check_flag("gradient_checkpointing", values["activation_checkpointing"] or False),
        every_n_layers=check_count("every_n_layers", kwargs.get("every_n_layers", 1), "every_n_layers=1"),
    )


def check_logistics(values: Mapping[str, Any]) -> None:
    """The settings that the plan does not hold, because HF's own callbacks read them.

    Raises:
        SettingError: An interval or a count is out of range.
    """
    for event in ("logging", "eval", "save"):
        check_interval({**values, "eval_steps": values["eval_steps"] or values["logging_steps"]}, event)
    _number(values, "eval_delay", "eval_delay=0")
    if values["save_total_limit"] is not None:
        check_count("save_total_limit", values["save_total_limit"], "save_total_limit=3, or None for no limit", low=0)
    if values["load_best_model_at_end"] and values["save_strategy"] not in ("best", values["eval_strategy"]):
        raise SettingError(
            f"load_best_model_at_end=True, eval_strategy={values['eval_strategy']!r}, "
            f"save_strategy={values['save_strategy']!r}",
            "the best model can only be loaded when every evaluation has a checkpoint",
            f"write eval_strategy={values['save_strategy']!r}",
        )
    if values["save_strategy"] == "best" and not (values["metric_for_best_model"] or values["load_best_model_at_end"]):
        raise SettingError(
            "save_strategy='best', metric_for_best_model=None",
            "the metric that says which checkpoint is the best",
            "write metric_for_best_model='loss'",
        )


def _number(values: Mapping[str, Any], name: str, remedy: str, **bounds: float) -> float:
    return check_number(name, values[name], remedy, **bounds)


def _count(values: Mapping[str, Any], name: str, remedy: str, **bounds: int) -> int:
    return check_count(name, values[name], remedy, **bounds)
