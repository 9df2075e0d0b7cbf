"""The scripts of the self-test that upstream's trainers run as well: their class is the argument."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..device import on_cpu
from .materials import LORA, SETTINGS, pairs, rows, write_model


def train_pairs(trainer_class: Any, folder: Path) -> Any:
    """Six steps of preference training with an adapter, whose reference is the model without it; the trainer."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig

    args = DPOConfig(output_dir=str(folder / "out"), use_cpu=on_cpu(), **SETTINGS)
    model, dataset = str(write_model(folder / "model")), Dataset.from_list(pairs())
    trainer = trainer_class(model, args=args, train_dataset=dataset, peft_config=LoraConfig(**LORA))
    trainer.train()
    return trainer


def train_language(trainer_class: Any, folder: Path) -> Any:
    """Six steps of all weights on tokenized rows, padded by a collator; the trainer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, TrainingArguments

    path = str(write_model(folder / "model"))
    settings = {**SETTINGS, "learning_rate": 1e-3}
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(path),
        args=TrainingArguments(output_dir=str(folder / "out"), use_cpu=on_cpu(), **settings),
        data_collator=DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(path)),
        train_dataset=[{"input_ids": row, "attention_mask": [1] * len(row), "labels": list(row)} for row in rows()],
    )
    trainer.train()
    return trainer
