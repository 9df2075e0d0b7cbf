"""One script twice: transformers.Trainer on torch's CPU and MLXTrainer, same model, rows and settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from pairs import SILENT, _quiet, text_rows, tokenizer
from peft import LoraConfig, get_peft_model

from hf_mlx import MLXTrainer

Made = tuple[list[dict[str, Any]], Any]


def load(folder: Path, lora: dict[str, Any] | None = None, **options: Any) -> Any:
    """The model of a folder in fp32, as a PeftModel where ``lora`` says how."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    if lora is None:
        return model
    torch.manual_seed(3)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))


def token_rows(count: int, seed: int = 0, **options: Any) -> list[dict[str, Any]]:
    """Tokenized rows of uneven length; ``options`` are the tokenizer's."""
    return [dict(tokenizer()(row["text"], **options)) for row in text_rows(count, seed)]


def run(cls: type, model: Any, settings: dict[str, Any], **keywords: Any) -> Made:
    """The log of one run, and its trainer."""
    with _quiet() as folder:
        trainer = cls(model, transformers.TrainingArguments(**{"output_dir": folder, **SILENT, **settings}), **keywords)
        trainer.train()
    return trainer.state.log_history, trainer


def run_both(make: Callable[[], Any], settings: dict[str, Any], make_keywords: Callable[[], dict]) -> tuple[Made, Made]:
    """transformers' run and ours."""
    theirs = run(transformers.Trainer, make(), settings, **make_keywords())
    return theirs, run(MLXTrainer, make(), settings, **make_keywords())
