"""Continued pre-training of a causal language model, of the shape of transformers' run_clm.py."""

import json
import logging
import math
import os
from dataclasses import dataclass, field
from itertools import chain

from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

logger = logging.getLogger(__name__)


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "folder"})


@dataclass
class DataArguments:
    train_file: str = field(metadata={"help": "JSON lines"})
    block_size: int = 16
    max_eval_samples: int | None = None


model_args, data_args, args = HfArgumentParser(
    (ModelArguments, DataArguments, TrainingArguments)
).parse_args_into_dataclasses()
last = get_last_checkpoint(args.output_dir) if os.path.isdir(args.output_dir) else None
set_seed(args.seed)
tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, dtype="float32")
with open(data_args.train_file) as lines:
    texts = Dataset.from_list([{"text": str(next(iter(json.loads(line).values())))} for line in lines])
if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
    model.resize_token_embeddings(len(tokenizer))
tokens = texts.map(lambda batch: tokenizer(batch["text"]), batched=True, remove_columns=texts.column_names)


def group_texts(examples):
    joined = {key: list(chain(*examples[key])) for key in examples}
    total = len(joined["input_ids"]) // data_args.block_size * data_args.block_size
    result = {
        key: [ids[i : i + data_args.block_size] for i in range(0, total, data_args.block_size)]
        for key, ids in joined.items()
    }
    result["labels"] = result["input_ids"].copy()
    return result


blocks = tokens.map(group_texts, batched=True)
held, blocks = blocks.select(range(5)), blocks.select(range(5, len(blocks)))
if data_args.max_eval_samples is not None:
    held = held.select(range(min(len(held), data_args.max_eval_samples)))


def preprocess_logits_for_metrics(logits, labels):
    if isinstance(logits, tuple):
        logits = logits[0]
    return logits.argmax(dim=-1)


def compute_metrics(eval_preds):
    preds, labels = eval_preds
    labels, preds = labels[:, 1:].reshape(-1), preds[:, :-1].reshape(-1)
    return {"accuracy": float((labels == preds).mean())}


trainer = Trainer(
    model=model,
    args=args,
    train_dataset=blocks if args.do_train else None,
    eval_dataset=held if args.do_eval else None,
    processing_class=tokenizer,
    data_collator=default_data_collator,
    compute_metrics=compute_metrics if args.do_eval else None,
    preprocess_logits_for_metrics=preprocess_logits_for_metrics if args.do_eval else None,
)
if args.do_train:
    result = trainer.train(resume_from_checkpoint=last)
    trainer.save_model()
    metrics = {**result.metrics, "train_samples": len(blocks)}
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()
if args.do_eval:
    metrics = trainer.evaluate()
    metrics["eval_samples"] = len(held)
    metrics["perplexity"] = math.exp(metrics["eval_loss"])
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
trainer.create_model_card(tags="text-generation")
print(type(trainer).__name__, "went on from", last and os.path.basename(last))
