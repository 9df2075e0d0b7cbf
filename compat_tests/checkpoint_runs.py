"""A small run with everything random switched on, in processes that can be killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

# Modules that a child process finds imported already; none of them computes anything at import.
PRELOAD = ["hf_mlx.trainers.sft", "trl", "peft", "datasets", "transformers.trainer_callback"]
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj", "down_proj"]}
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 14,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 4,
    "weight_decay": 0.01,
    "neftune_noise_alpha": 5.0,
    "logging_steps": 3,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 2,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
}


def make_rows(count: int = 23) -> list[dict[str, str]]:
    """Prompt and completion, of uneven length."""
    return [
        {"prompt": f"What is {i} plus {i % 7}? ", "completion": f"It is {i + i % 7}. " * (1 + i % 3)}
        for i in range(count)
    ]


def make_trainer(
    model: str | Path, output_dir: str | Path, *, lora: bool = True, rows: int = 23, **settings: Any
) -> Any:
    """The run's trainer; keywords that are no setting go to the trainer itself."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig

    from hf_mlx import MLXSFTTrainer

    own = {key: settings.pop(key) for key in ("callbacks", "max_grad_value") if key in settings}
    data = Dataset.from_list(make_rows(rows))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return MLXSFTTrainer(
            str(model),
            SFTConfig(output_dir=str(output_dir), **{**SETTINGS, **settings}),
            train_dataset=data,
            eval_dataset=data.select(range(6)),
            peft_config=LoraConfig(**LORA) if lora else None,
            **own,
        )


def make_preference_trainer(model: str | Path, output_dir: str | Path, *, lora: bool = True, **settings: Any) -> Any:
    """The same of preference training, dropout included."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig

    from hf_mlx import MLXDPOTrainer

    rows = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "No. "} for row in make_rows()]
    common = {key: value for key, value in SETTINGS.items() if key != "neftune_noise_alpha"}
    data = Dataset.from_list(rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return MLXDPOTrainer(
            str(model),
            args=DPOConfig(output_dir=str(output_dir), **{**common, "disable_dropout": False, **settings}),
            train_dataset=data,
            eval_dataset=data.select(range(6)),
            peft_config=LoraConfig(**LORA) if lora else None,
        )


def run_child(model: str, output_dir: str, kill_at: int | None, settings: dict[str, Any]) -> None:
    """Train to the end from what is there; die by SIGKILL at the ``kill_at``-th file operation below output_dir."""
    import logging

    from hf_mlx.blas import load_openblas
    from hf_mlx.errors import CheckpointError

    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    logging.disable(logging.CRITICAL)
    load_openblas()
    make = make_preference_trainer if settings.pop("preferences", False) else make_trainer
    trainer = make(model, output_dir, **settings)
    if kill_at is not None:
        _die_at(kill_at, output_dir)
    try:
        trainer.train(resume_from_checkpoint=True)
    except CheckpointError as error:
        if "no checkpoint-N folder" not in error.received:
            raise
        trainer.train()
    trainer.save_model(str(Path(output_dir, "final")))
    trainer.save_state()


def _die_at(count: int, folder: str) -> None:
    left = [count]

    def hook(event: str, arguments: tuple) -> None:
        if event not in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"):
            return
        # rmtree works with names relative to a folder it holds open.
        if folder not in str(arguments[0]) and event != "os.remove":
            return
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def start(model: Path, output_dir: Path, kill_at: int | None = None, **settings: Any) -> Any:
    """The run in a process of its own, forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=run_child, args=(str(model), str(output_dir), kill_at, settings))
    process.start()
    return process


def final_bytes(output_dir: Path) -> bytes:
    """The adapter, or the model, that a run ended with."""
    (weights,) = [*output_dir.glob("final/adapter_model.safetensors"), *output_dir.glob("final/model.safetensors")]
    return weights.read_bytes()


def timeless(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Log entries without what depends on the clock, and without the summary of a single call."""
    entries = [{k: v for k, v in entry.items() if "runtime" not in k and "per_second" not in k} for entry in history]
    return [entry for entry in entries if "train_loss" not in entry]
