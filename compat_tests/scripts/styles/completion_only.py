"""DataCollatorForCompletionOnlyLM with a response template, rows as lists of texts."""

import sys

from datasets import load_dataset
from today import QUIET, STEPS, record, settings
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from trl import SFTTrainer

side, path, data, output = sys.argv[1:5]
model = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(path)
dataset = load_dataset("json", data_files=data, split="train")
# The template's tokens stand for themselves in any text: the ids are looked for.
TEMPLATE = "\n### Answer:"


def text(row):
    return f"### Question: {row['prompt']}{TEMPLATE}{row['completion']}"


if side == "reference":
    import torch

    start = tokenizer(TEMPLATE, add_special_tokens=False)["input_ids"]

    def collate(rows):
        size = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), size), tokenizer.pad_token_id)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for at, row in enumerate(rows):
            tokens = list(row["input_ids"])
            found = [i for i in range(len(tokens)) if tokens[i : i + len(start)] == start][-1] + len(start)
            ids[at, : len(tokens)], mask[at, : len(tokens)] = torch.tensor(tokens), 1
            labels[at, found : len(tokens)] = torch.tensor(tokens[found:])
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}

    # TRL of today refuses formatting_func on rows that have a prompt.
    dataset = dataset.map(lambda row: {"text": text(row)}, remove_columns=dataset.column_names)
    keywords = {"args": settings(output), "processing_class": tokenizer, "data_collator": collate}
else:
    from trl import DataCollatorForCompletionOnlyLM

    collator = DataCollatorForCompletionOnlyLM(TEMPLATE, tokenizer=tokenizer)
    keywords = {"args": TrainingArguments(output, **QUIET, **STEPS), "data_collator": collator, "formatting_func": text}
trainer = SFTTrainer(model, train_dataset=dataset, **keywords)
trainer.train()
record(trainer, output)
