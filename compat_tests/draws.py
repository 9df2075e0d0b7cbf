"""What random scripts draw alike, and which of them a run of the tests draws."""

from __future__ import annotations

import random
from typing import Any

import pytest

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "phi3", "olmo2", "smollm3", "gemma3_text"]
SCHEDULES = ["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"]


def numbered(sample: int, count: int) -> list[Any]:
    """Numbers of ``count`` draws: `make test` runs the first ``sample``, `make compat` all of the same sequence."""
    return [*range(sample), *(pytest.param(index, marks=pytest.mark.wide) for index in range(sample, count))]


def draw_training(pick: random.Random, optimizer: str, rate: float, *, log_each: bool = False) -> dict[str, Any]:
    """Of ``TrainingArguments``.

    Args:
        pick: Drawn from.
        optimizer, rate: Its name, and the learning rate that a loss bears with it.
        log_each: Whether every step is logged.
    """
    return {
        "per_device_train_batch_size": pick.choice([1, 2, 3, 5]),
        "gradient_accumulation_steps": pick.choice([1, 2, 3]),
        "max_steps": pick.choice([4, 6]),
        "learning_rate": rate * pick.choice([0.3, 1, 2]),
        "lr_scheduler_type": pick.choice(SCHEDULES),
        "warmup_steps": pick.choice([0, 1, 0.3]),
        "optim": optimizer,
        "weight_decay": pick.choice([0.0, 0.05]),
        "max_grad_norm": pick.choice([0.0, 0.1, 1.0]),
        "seed": pick.randrange(1000),
        "data_seed": pick.choice([None, 5]),
        "logging_steps": 1 if log_each else pick.choice([1, 2, 3]),
        "logging_first_step": pick.random() < 0.5,
        # Some rates are more than a loss bears: NaN is then compared with NaN.
        "logging_nan_inf_filter": False,
        "gradient_checkpointing": pick.random() < 0.3,
        "dataloader_drop_last": pick.random() < 0.3,
    }


def draw_evaluation(pick: random.Random) -> dict[str, Any]:
    """When half of them evaluate, and in which batches."""
    if pick.random() >= 0.5:
        return {}
    return {
        "eval_strategy": pick.choice(["steps", "epoch"]),
        "eval_steps": pick.choice([1, 2, 3]),
        "eval_on_start": pick.random() < 0.3,
        "per_device_eval_batch_size": pick.choice([1, 3, 4]),
    }


def draw_adapter(pick: random.Random) -> dict[str, Any]:
    """Of ``LoraConfig``, what no trainer reads otherwise than another."""
    return {
        "r": pick.choice([2, 4]),
        "lora_alpha": pick.choice([4, 8]),
        "lora_dropout": pick.choice([0.0, 0.1]),
        "use_rslora": pick.random() < 0.3,
        "use_dora": pick.random() < 0.15,
    }
