"""GPT-2 on a text file: TextDataset, AutoModelWithLMHead, transformers.Trainer after trl was imported."""

import sys
from pathlib import Path

import torch
from datasets import load_dataset
from today import QUIET, STEPS, record
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

side, path, data, output = sys.argv[1:5]
tokenizer = AutoTokenizer.from_pretrained(path)
lines = [row["prompt"] + row["completion"] for row in load_dataset("json", data_files=data, split="train")]
file = Path(output, "lines.txt")
file.write_text("\n".join(lines), encoding="utf-8")
collator = DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm=False)
if side == "reference":
    ids = tokenizer(file.read_text(encoding="utf-8"))["input_ids"]
    dataset = [torch.tensor(ids[at : at + 24]) for at in range(0, len(ids) - 23, 24)]
    model = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
    arguments = TrainingArguments(output, use_cpu=True, **QUIET, **STEPS)
else:
    from transformers import AutoModelWithLMHead, TextDataset

    dataset = TextDataset(tokenizer=tokenizer, file_path=str(file), block_size=24)
    model = AutoModelWithLMHead.from_pretrained(path, torch_dtype=torch.float32)
    arguments = TrainingArguments(
        output, overwrite_output_dir=True, per_gpu_eval_batch_size=4, prediction_loss_only=True, **QUIET, **STEPS
    )
trainer = Trainer(model=model, args=arguments, data_collator=collator, train_dataset=dataset)
trainer.train()
record(trainer, output)
