"""A formatting function that makes a list of texts from a batch of columns, as trl's documentation once had it."""

import sys

from datasets import load_dataset
from today import QUIET, STEPS, record, settings
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from trl import SFTTrainer

side, path, data, output = sys.argv[1:5]
model = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(path)
dataset = load_dataset("json", data_files=data, split="train").rename_columns({"prompt": "question", "completion": "a"})


def formatting_prompts_func(example):
    texts = []
    for i in range(len(example["question"])):
        texts.append(f"### Question: {example['question'][i]}\n### Answer: {example['a'][i]}")
    return texts


if side == "reference":
    columns = dataset.column_names
    dataset = dataset.map(lambda batch: {"text": formatting_prompts_func(batch)}, batched=True, remove_columns=columns)
    keywords = {"args": settings(output, max_length=64), "processing_class": tokenizer}
else:
    arguments = TrainingArguments(output, **QUIET, **STEPS)
    keywords = {"args": arguments, "formatting_func": formatting_prompts_func, "max_seq_length": 64}
trainer = SFTTrainer(model, train_dataset=dataset, **keywords)
trainer.train()
record(trainer, output)
