"""Alpaca's prompt in a formatting function over whole batches of columns, all weights trained."""

import sys

from datasets import load_dataset
from today import QUIET, STEPS, record, settings
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from trl import SFTTrainer

side, path, data, output = sys.argv[1:5]
PROMPT = "### Instruction:\n{}\n\n### Response:\n{}"
tokenizer = AutoTokenizer.from_pretrained(path)
EOS_TOKEN = tokenizer.eos_token


def formatting_prompts_func(examples):
    pairs = zip(examples["prompt"], examples["completion"], strict=True)
    return {"text": [PROMPT.format(instruction, answer) + EOS_TOKEN for instruction, answer in pairs]}


dataset = load_dataset("json", data_files=data, split="train").map(formatting_prompts_func, batched=True)
if side == "reference":
    model = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
    dataset = dataset.select_columns("text")
    arguments, keywords = settings(output, seed=3407), {"processing_class": tokenizer}
else:
    model = AutoModelForCausalLM.from_pretrained(path, torch_dtype="float32", device_map="auto")
    arguments = TrainingArguments(output, seed=3407, logging_dir="logs", **QUIET, **STEPS)
    keywords = {"tokenizer": tokenizer, "dataset_text_field": "text", "max_seq_length": 1024, "dataset_num_proc": 2}
trainer = SFTTrainer(model=model, args=arguments, train_dataset=dataset, **keywords)
trainer.train()
record(trainer, output)
