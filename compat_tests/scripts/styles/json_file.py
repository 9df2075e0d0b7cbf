"""Arguments from a JSON file, read and written by their older names; bitsandbytes' optimizer, a collator of answers."""

import json
import sys
from pathlib import Path

import torch
from datasets import load_dataset
from today import QUIET, STEPS, record, settings
from transformers import AutoModelForCausalLM, AutoTokenizer, EarlyStoppingCallback, HfArgumentParser, TrainerCallback
from trl import SFTConfig, SFTTrainer

side, path, data, output = sys.argv[1:5]
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
dataset = load_dataset("json", data_files=data, split="train").map(lambda row: {"text": "".join(row.values())})
dataset = dataset.select_columns("text")
common = {"eval_steps": 2, "save_steps": 2, "metric_for_best_model": "answers", "load_best_model_at_end": True}
common |= QUIET | STEPS | {"save_strategy": "steps"}


class Collator:
    """Trains on what follows a question mark."""

    def __call__(self, rows):
        kept = [{"input_ids": row["input_ids"]} for row in rows]
        batch = tokenizer.pad(kept, padding=True, return_tensors="pt")
        mark = tokenizer.convert_tokens_to_ids("?")
        labels = batch["input_ids"].clone()
        labels[batch["attention_mask"] == 0] = -100
        for row, ids in zip(labels, batch["input_ids"].tolist(), strict=True):
            row[: ids.index(mark) + 1 if mark in ids else 0] = -100
        batch["labels"] = labels
        return batch


class KeepAdapter(TrainerCallback):
    def on_save(self, args, state, control, model=None, **kwargs):
        model.save_pretrained(Path(args.output_dir, "kept"))
        return control


def best(logits, labels):
    return logits.argmax(dim=-1)


def count(prediction):
    found, labels = prediction
    mask = labels[:, 1:] != -100
    return {"answers": float((found[:, :-1][mask] == labels[:, 1:][mask]).mean())}


if side == "reference":
    arguments = settings(output, eval_strategy="steps", warmup_steps=0.5, max_length=40, **common)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    inner, keyword = model, "processing_class"
else:
    import bitsandbytes as bnb

    file = Path(output, "arguments.json")
    older = {"output_dir": output, "evaluation_strategy": "steps", "warmup_ratio": 0.1, "max_seq_length": 40}
    file.write_text(json.dumps(common | older | {"bf16": False, "num_of_sequences": 64, "logging_dir": "logs"}))
    (arguments,) = HfArgumentParser(SFTConfig).parse_json_file(str(file))
    read = (arguments.max_seq_length, arguments.warmup_ratio, arguments.group_by_length, arguments.logging_dir)
    print("read", read, arguments.evaluation_strategy == "steps", arguments.save_safetensors)
    arguments.evaluation_strategy = "steps"
    arguments.warmup_ratio = 0.5
    optimizer = bnb.optim.PagedAdamW8bit(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    inner, keyword = torch.compile(model), "tokenizer"
trainer = SFTTrainer(
    inner,
    arguments,
    train_dataset=dataset.select(range(16)),
    eval_dataset=dataset.select(range(16, 23)),
    data_collator=Collator(),
    compute_metrics=count,
    preprocess_logits_for_metrics=best,
    callbacks=[EarlyStoppingCallback(early_stopping_patience=2), KeepAdapter()],
    optimizers=(optimizer, None),
    **{keyword: tokenizer},
)
trainer.train()
record(trainer, output)
print("answers", round(trainer.evaluate()["eval_answers"], 6), trainer.state.best_global_step)
