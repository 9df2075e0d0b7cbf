"""A causal language modeling script of the shape of transformers' run_clm.py."""

import json
import sys
from itertools import chain

from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

model_path, rows_path = sys.argv[1:3]
(args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(sys.argv[3:])
tokenizer = AutoTokenizer.from_pretrained(model_path)
model = AutoModelForCausalLM.from_pretrained(model_path, dtype="float32")
with open(rows_path) as lines:
    texts = Dataset.from_list([{"text": str(next(iter(json.loads(line).values())))} for line in lines])

tokens = texts.map(lambda batch: tokenizer(batch["text"]), batched=True, remove_columns=texts.column_names)
BLOCK = 16


def group(rows):
    joined = {key: list(chain(*rows[key])) for key in rows}
    total = len(joined["input_ids"]) // BLOCK * BLOCK
    blocks = {key: [ids[i : i + BLOCK] for i in range(0, total, BLOCK)] for key, ids in joined.items()}
    blocks["labels"] = [list(ids) for ids in blocks["input_ids"]]
    return blocks


blocks = tokens.map(group, batched=True, remove_columns=tokens.column_names)
trainer = Trainer(
    model=model,
    args=args,
    train_dataset=blocks,
    eval_dataset=blocks.select(range(4)),
    processing_class=tokenizer,
    data_collator=default_data_collator,
)
result = trainer.train()
trainer.save_model()
trainer.log_metrics("train", {"train_samples": len(blocks)})
trainer.save_state()
print(type(trainer).__name__, sorted(trainer.evaluate())[:2])
