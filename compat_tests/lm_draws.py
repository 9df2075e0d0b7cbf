"""Random scripts of transformers.Trainer: rows, masks, labels, collators, losses, adapters, settings, metrics."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from draws import FAMILIES
from pairs import tokenizer
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    DataCollatorWithPadding,
    default_data_collator,
)

WIDTH = 20


class Indexed(torch.utils.data.Dataset):
    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {key: torch.tensor(value) for key, value in self.rows[index].items()}


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)


@dataclass
class Script:
    """One script, as both trainers run it.

    Attributes:
        family, model: What model, and what its config says beside the common sizes.
        settings: Of ``TrainingArguments``.
        lora: Of ``LoraConfig``; None trains all weights.
        loss: Which loss the script brings.
        metrics: Which form of ``compute_metrics``.
        rows: What the keywords of the trainer are made of.
        keywords: Makes them anew for each run.
    """

    family: str
    model: dict[str, Any]
    settings: dict[str, Any]
    lora: dict[str, Any] | None
    loss: str
    metrics: str
    rows: dict[str, Any]
    keywords: Callable[[], dict[str, Any]] = field(repr=False)


def draw_rows(pick: random.Random, count: int, *, padded: bool, side: str, masks: str, labels: str) -> list[dict]:
    """Rows of ids, with or without padding to one width."""
    words, rows = len(tokenizer()), []
    for _ in range(count):
        length = pick.randint(2, WIDTH)
        ids = [pick.randrange(5, words) for _ in range(length)]
        if pick.random() < 0.3:
            ids[pick.randrange(length)] = 2  # the padding token, as a token
        mask = [1] * length
        target = list(ids)
        if labels != "all":
            cut = pick.randrange(length)
            target = [-100] * cut + target[cut:]
        if padded:
            fill, ignored = [2] * (WIDTH - length), [2 if labels == "padding too" else -100] * (WIDTH - length)
            ids, mask = (
                (ids + fill, mask + [0] * len(fill)) if side == "right" else (fill + ids, [0] * len(fill) + mask)
            )
            target = target + ignored if side == "right" else ignored + target
        if masks == "holes":
            mask = [int(one and pick.random() > 0.3) for one in mask]
        row = {"input_ids": ids, "attention_mask": mask, "labels": target}
        if masks == "none":
            del row["attention_mask"]
        rows.append(row)
    return rows


def _pad(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A collator of a script's own: numpy arrays, padding on the left."""
    width = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 2, "attention_mask": 0, "labels": -100}
    padded = {
        key: [[fill[key]] * (width - len(row[key])) + list(row[key]) for row in rows] for key in rows[0] if key in fill
    }
    return {key: torch.tensor(np.array(value)) for key, value in padded.items()}


def _left(collate: Callable) -> Callable:
    def call(rows: list[dict[str, Any]]) -> Any:
        tokenizer().padding_side = "left"
        try:
            return collate(rows)
        finally:
            tokenizer().padding_side = "right"

    return call


COLLATORS: dict[str, Callable[[], Callable | None]] = {
    "language modeling": lambda: DataCollatorForLanguageModeling(tokenizer(), mlm=False),
    "language modeling, multiples": lambda: DataCollatorForLanguageModeling(
        tokenizer(), mlm=False, pad_to_multiple_of=8
    ),
    "language modeling, left": lambda: _left(DataCollatorForLanguageModeling(tokenizer(), mlm=False)),
    "seq2seq": lambda: DataCollatorForSeq2Seq(tokenizer(), padding=True),
    "seq2seq, left": lambda: _left(DataCollatorForSeq2Seq(tokenizer(), padding=True)),
    "own": lambda: _pad,
    "flattening": DataCollatorWithFlattening,
    "default": lambda: default_data_collator,
    "padding": lambda: DataCollatorWithPadding(tokenizer()),
    "none": lambda: None,
}
# Those that pad nothing themselves.
_PADDED_ROWS = ("default", "padding", "none")
_WITHOUT_LABELS = ("language modeling", "language modeling, multiples", "language modeling, left")

SETS: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
    "datasets": Dataset.from_list,
    "datasets, torch": lambda rows: Dataset.from_list(rows).with_format("torch"),
    "datasets, numpy": lambda rows: Dataset.from_list(rows).with_format("numpy"),
    "list": list,
    "torch": Indexed,
    "stream": lambda rows: IterableDataset.from_generator(lambda: iter(rows)),
    "torch stream": Stream,
}
ADAPTERS: list[dict[str, Any]] = [
    {"r": 2, "lora_alpha": 8, "target_modules": "all-linear"},
    {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    {"r": 3, "lora_alpha": 8, "target_modules": ["o_proj", "down_proj"], "use_dora": True},
    {"r": 2, "lora_alpha": 8, "target_modules": ["o_proj", "embed_tokens"]},
    {"r": 2, "lora_alpha": 8, "target_modules": ["o_proj"], "modules_to_save": ["lm_head"]},
    {"r": 2, "lora_alpha": 8, "target_modules": ["o_proj"], "trainable_token_indices": [2, 9, 40]},
    {"r": 2, "lora_alpha": 8, "target_modules": ["o_proj"], "rank_pattern": {"1.self_attn.o_proj": 5}},
    {"r": 2, "lora_alpha": 8, "target_modules": ["down_proj"], "lora_bias": True, "layers_to_transform": [1]},
]
SCHEDULES: list[tuple[str, dict[str, Any] | None]] = [
    ("linear", None),
    ("cosine", None),
    ("constant", None),
    ("constant_with_warmup", None),
    ("inverse_sqrt", None),
    ("cosine_with_restarts", {"num_cycles": 2}),
    ("polynomial", {"power": 2.0, "lr_end": 1e-6}),
    ("cosine_with_min_lr", {"min_lr": 1e-5}),
    ("warmup_stable_decay", {"num_decay_steps": 2}),
]
OPTIMIZERS: list[tuple[str, str | None]] = [
    ("adamw_torch", None),
    ("adamw_torch_fused", None),
    ("sgd", None),
    ("sgd", "momentum=0.9,nesterov=True"),
    ("adagrad", None),
    ("rmsprop", None),
    ("rmsprop", "momentum=0.5,centered=True"),
    ("adafactor", None),
]


def own_loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    """Cross entropy with a margin, summed over the window's tokens."""
    logits, targets = outputs["logits"][:, :-1].float(), labels[:, 1:]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-100, reduction="none")
    total = (losses * (1 + 0.1 * losses.detach())).sum()
    return total / (num_items_in_batch if num_items_in_batch is not None else (targets != -100).sum())


def compute_metrics(prediction: Any, compute_result: bool | None = None) -> dict[str, float]:
    """How often the next token is the likeliest, and what the arrays sum up to."""
    found, labels = (np.asarray(part) for part in (prediction.predictions, prediction.label_ids))
    found = found if found.ndim == 2 else found.argmax(-1)
    scored = labels[:, 1:] != -100
    hits = float((found[:, :-1] == labels[:, 1:])[scored].mean()) if scored.any() else 0.0
    extra = {} if prediction.losses is None else {"losses": float(np.asarray(prediction.losses).sum())}
    return {"accuracy": hits, "scored": float(scored.sum()), **extra}


METRICS: dict[str, dict[str, Any]] = {
    "no": {},
    "logits": {},
    "argmax": {},
    "by batch": {"batch_eval_metrics": True},
    "with losses": {"include_for_metrics": ["inputs", "loss"]},
    "moved often": {"eval_accumulation_steps": 1},
}


def draw(seed: str) -> Script:
    """The script of a seed."""
    pick = random.Random(seed)
    family = pick.choice(FAMILIES)
    collator, kind = pick.choice(list(COLLATORS)), pick.choice(list(SETS))
    labels = pick.choice(["all", "some", "padding too"])
    masks = pick.choice(["plain", "plain", "holes", "none"])
    side = pick.choice(["right", "right", "left"])
    padded = collator in _PADDED_ROWS
    if collator == "flattening":
        masks = "plain"
    if masks == "none" and collator in ("seq2seq", "seq2seq, left", "padding", *_WITHOUT_LABELS):
        masks = "plain"
    rows = {"collator": collator, "set": kind, "labels": labels, "masks": masks, "side": side}
    size = pick.choice([5, 8, 11, 13])

    def make(count: int, which: str, of: str) -> Any:
        made = draw_rows(random.Random(f"{seed} {of}"), count, padded=padded, side=side, masks=masks, labels=labels)
        if collator in _WITHOUT_LABELS:
            made = [{key: value for key, value in row.items() if key != "labels"} for row in made]
        if lengths:
            made = [{**row, lengths: len(row["input_ids"]) + 3 * (at % 2)} for at, row in enumerate(made)]
        if extra:
            made = [{**row, "weight": 0.5} for row in made]
        return SETS[which](made)

    streams = "stream" in kind
    schedule, options = pick.choice(SCHEDULES)
    optimizer, optim_args = pick.choice(OPTIMIZERS)
    settings: dict[str, Any] = {
        "per_device_train_batch_size": pick.choice([1, 2, 3, 5]),
        "per_device_eval_batch_size": pick.choice([1, 2, 3, 5]),
        "gradient_accumulation_steps": pick.choice([1, 2, 3, 4]),
        "learning_rate": pick.choice([1e-4, 1e-3]),
        "lr_scheduler_type": schedule,
        "lr_scheduler_kwargs": options,
        "warmup_steps": pick.choice([0, 1, 0.3]),
        "optim": optimizer,
        "optim_args": optim_args,
        "weight_decay": pick.choice([0.0, 0.05]),
        "max_grad_norm": pick.choice([0.0, 0.1, 1.0]),
        "label_smoothing_factor": pick.choice([0.0, 0.0, 0.1]),
        "seed": pick.randrange(1000),
        "data_seed": pick.choice([None, 5]),
        "logging_steps": pick.choice([1, 2]),
        "logging_first_step": pick.random() < 0.5,
        "gradient_checkpointing": pick.random() < 0.3,
        "dataloader_drop_last": pick.random() < 0.3,
        "include_num_input_tokens_seen": pick.choice(["no", "no", "all", "non_padding"]),
    }
    settings |= pick.choice([{"max_steps": 4}, {"max_steps": 6}, {"num_train_epochs": 2}, {"num_train_epochs": 1.5}])
    if streams:
        settings = {**settings, "max_steps": 4}
        size = 40
    extra = not padded and collator not in ("seq2seq", "seq2seq, left", "flattening") and pick.random() < 0.3
    lengths = None
    if not streams and collator != "flattening":
        settings["train_sampling_strategy"] = pick.choice(["random", "random", "sequential", "group_by_length"])
        if settings["train_sampling_strategy"] == "group_by_length" and pick.random() < 0.5:
            lengths = settings["length_column_name"] = "tokens"
    if (extra or lengths) and collator == "own" and pick.random() < 0.5:
        settings["remove_unused_columns"] = False
    if settings["dataloader_drop_last"] and not streams:
        settings["per_device_train_batch_size"] = min(settings["per_device_train_batch_size"], size)
    metrics = "no"
    evaluates = pick.random() < 0.5
    if evaluates:
        settings |= {"eval_strategy": "steps", "eval_steps": pick.choice([1, 2, 3])}
        metrics = pick.choice(list(METRICS))
        if schedule == "constant" and pick.random() < 0.5:
            settings["lr_scheduler_type"] = "reduce_lr_on_plateau"
            settings["lr_scheduler_kwargs"] = {"factor": 0.5, "patience": 0}
        if metrics == "by batch" and settings["dataloader_drop_last"]:
            settings["per_device_eval_batch_size"] = 1
    settings |= METRICS[metrics]
    loss = pick.choice(["model's", "model's", "model's", "compute_loss_func", "compute_loss"])
    if loss != "model's":
        settings["label_smoothing_factor"] = 0.0
    lora = pick.choice([None, None, *ADAPTERS])
    if lora is not None and family == "phi3":
        lora = ADAPTERS[0]
    model = {"pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1} if pick.random() < 0.6 else {}
    if family in ("phi3", "olmo2", "smollm3"):
        model = {}

    def keywords() -> dict[str, Any]:
        # Collators of streams and flattened rows see lists, as those of scripts do.
        made: dict[str, Any] = {"train_dataset": make(size, kind, "train")}
        if (collate := COLLATORS[collator]()) is not None:
            made["data_collator"] = collate
        if settings.get("train_sampling_strategy") == "group_by_length" or pick_class:
            made["processing_class"] = tokenizer()
        if evaluates:
            made["eval_dataset"] = make(7, eval_kind, "eval")
        if metrics != "no":
            made["compute_metrics"] = compute_metrics
        if metrics in ("argmax", "by batch"):
            made["preprocess_logits_for_metrics"] = lambda logits, labels: logits.argmax(-1)
        if loss == "compute_loss_func":
            made["compute_loss_func"] = own_loss
        return made

    eval_kind = pick.choice([name for name in SETS if "stream" not in name])
    pick_class = pick.random() < 0.3
    return Script(family, model, settings, lora, loss, metrics, rows | {"size": size}, keywords)


def with_own_loss(cls: type) -> type:
    """``cls`` of a script that overrides ``compute_loss``."""

    class Own(cls):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None):
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            loss = own_loss(outputs, labels, num_items_in_batch)
            return (loss, outputs) if return_outputs else loss

    return Own
