"""train() called again on one trainer, and a run resumed on another schedule: every log entry is TRL's."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from pairs import SILENT, rows_of, tiny_model
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from hf_mlx import MLXSFTTrainer

# As in test_trajectory_families: the promise of the library in fp32.
RELATIVE = 1e-4
ROWS = rows_of("text", 12, seed=4)
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
BASIC: dict[str, Any] = {
    **SILENT,
    "per_device_train_batch_size": 2,
    "learning_rate": 5e-3,
    "logging_steps": 1,
    "max_length": 32,
    "gradient_checkpointing": False,
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"optim": "adamw_torch"},
    "adagrad": {"optim": "adagrad", "optim_args": "lr_decay=0.1"},
    "rmsprop": {"optim": "rmsprop"},
    "adafactor": {"optim": "adafactor"},
    "sgd": {"optim": "sgd", "optim_args": "momentum=0.9,dampening=0.5"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(tiny_model("llama", tmp_path_factory.mktemp("base"), hidden_size=32, intermediate_size=48))


def make(kind: Any, model: str, output: Path, **settings: Any) -> Any:
    return kind(
        model,
        SFTConfig(output_dir=str(output), **{**BASIC, **settings}),
        train_dataset=Dataset.from_list(ROWS),
        eval_dataset=Dataset.from_list(ROWS[:3]),
        peft_config=LoraConfig(**LORA),
    )


def curve(trainer: Any) -> list[tuple[float, ...]]:
    keys = ("step", "loss", "grad_norm", "learning_rate")
    return [tuple(entry[key] for key in keys) for entry in trainer.state.log_history if "loss" in entry]


def assert_same(theirs: list[tuple[float, ...]], ours: list[tuple[float, ...]]) -> None:
    assert len(theirs) == len(ours) >= 2
    for a, b in zip(theirs, ours, strict=True):
        assert b == pytest.approx(a, rel=RELATIVE, abs=RELATIVE * 1e-3)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_second_train_goes_on_with_the_optimizer(name, model, tmp_path):
    """Twice on one trainer, then from the second run's checkpoint in a fresh one, written by either side."""
    curves = {}
    saving = {"save_strategy": "steps", "save_steps": 2, **OPTIMIZERS[name]}
    for side, kind in (("theirs", SFTTrainer), ("ours", MLXSFTTrainer)):
        trainer = make(kind, model, tmp_path / side, max_steps=3, **saving)
        trainer.train()
        trainer.train()
        curves[side] = [curve(trainer)]
        trainer.train(resume_from_checkpoint=str(tmp_path / side / "checkpoint-2"))
        curves[side].append(curve(trainer))
    for side in ("theirs", "ours"):
        fresh = make(MLXSFTTrainer, model, tmp_path / "fresh", max_steps=3, **OPTIMIZERS[name])
        fresh.train(resume_from_checkpoint=str(tmp_path / side / "checkpoint-2"))
        assert_same(curves["theirs"][1], curve(fresh))
    for theirs, ours in zip(*curves.values(), strict=True):
        assert_same(theirs, ours)


CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "more steps": ({"max_steps": 2}, {"max_steps": 5}),
    "fewer steps": ({"max_steps": 6}, {"max_steps": 4}),
    "more epochs": (
        {"num_train_epochs": 1, "lr_scheduler_type": "cosine"},
        {"num_train_epochs": 2, "lr_scheduler_type": "cosine"},
    ),
    "another schedule": ({"max_steps": 5}, {"max_steps": 5, "lr_scheduler_type": "cosine"}),
    "other warmup": ({"max_steps": 4, "warmup_steps": 1}, {"max_steps": 4, "warmup_steps": 4}),
    "other rate": ({"max_steps": 4}, {"max_steps": 4, "learning_rate": 1e-3}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_resume_on_another_schedule(change, model, tmp_path, caplog):
    before, after = CHANGES[change]
    last, curves = 6 if change == "more epochs" else 2, []
    for side, kind in (("theirs", SFTTrainer), ("ours", MLXSFTTrainer)):
        make(kind, model, tmp_path / side, save_strategy="steps", save_steps=2, **before).train()
        trainer = make(kind, model, tmp_path / side, **after)
        with caplog.at_level(logging.WARNING, "hf_mlx"):
            trainer.train(resume_from_checkpoint=str(tmp_path / side / f"checkpoint-{last}"))
        curves.append(curve(trainer))
    assert_same(*curves)
    said = [record for record in caplog.messages if "first step still has its learning rate" in record]
    assert len(said) == (0 if change == "other rate" else 1)
