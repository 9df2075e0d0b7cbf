"""MLXTrainer beside transformers.Trainer in fp32: every logged value and its order, for each kind of rows."""

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from lm_pairs import load, run_both, token_rows
from pairs import assert_same_log, tiny_model, tokenizer, untimed
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    DataCollatorWithPadding,
    default_data_collator,
)

# The promise of the library in fp32.
RELATIVE = 1e-4
SETTINGS = {
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 2,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "seed": 3,
}


class Rows(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {key: torch.tensor(value) for key, value in self.rows[index].items()}


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def labelled(rows):
    return [{**row, "labels": list(row["input_ids"])} for row in rows]


def padded(rows=11, side="right", scored=True):
    """Rows of 24 tokens; labels are copied, padding included, as scripts do."""
    made = tokenizer()
    made.padding_side = side
    try:
        found = token_rows(rows, padding="max_length", max_length=24, truncation=True)
    finally:
        made.padding_side = "right"
    return labelled(found)


def holed(rows=11):
    pick = np.random.default_rng(0)
    out = []
    for row in padded(rows):
        mask = (pick.random(24) > 0.4).astype(int)
        mask[: pick.integers(0, 4)] = 0
        out.append({**row, "attention_mask": mask.tolist()})
    return out


def collator(**options):
    return DataCollatorForLanguageModeling(tokenizer(), mlm=False, **options)


def left():
    made = DataCollatorForLanguageModeling(tokenizer(), mlm=False)

    def collate(rows):
        tokenizer().padding_side = "left"
        try:
            return made(rows)
        finally:
            tokenizer().padding_side = "right"

    return collate


KINDS = {
    "language modeling": lambda: {"train_dataset": Dataset.from_list(token_rows(11)), "data_collator": collator()},
    "list of rows": lambda: {"train_dataset": token_rows(11), "data_collator": collator(pad_to_multiple_of=8)},
    "torch format": lambda: {
        "train_dataset": Dataset.from_list(token_rows(11)).with_format("torch"),
        "data_collator": collator(),
    },
    "other columns": lambda: {
        "train_dataset": Dataset.from_list([{**row, "text": "x", "n": 1} for row in token_rows(11)]),
        "data_collator": collator(),
    },
    "torch dataset": lambda: {"train_dataset": Rows(padded()), "data_collator": default_data_collator},
    "no collator": lambda: {"train_dataset": Dataset.from_list(padded())},
    "seq2seq collator": lambda: {
        "train_dataset": Dataset.from_list(labelled(token_rows(11))),
        "data_collator": DataCollatorForSeq2Seq(tokenizer(), padding=True),
    },
    "padding collator": lambda: {"train_dataset": padded(), "data_collator": DataCollatorWithPadding(tokenizer())},
    "processing class": lambda: {"train_dataset": padded(), "processing_class": tokenizer()},
    "scored padding": lambda: {"train_dataset": Dataset.from_list(padded())},
    "left padding": lambda: {"train_dataset": Dataset.from_list(token_rows(11)), "data_collator": left()},
    "scored left padding": lambda: {"train_dataset": Dataset.from_list(padded(side="left"))},
    "masks with holes": lambda: {"train_dataset": Dataset.from_list(holed())},
    "no mask": lambda: {
        "train_dataset": [{k: row[k] for k in ("input_ids", "labels")} for row in padded()],
    },
    "flattening": lambda: {"train_dataset": token_rows(11), "data_collator": DataCollatorWithFlattening()},
    "stream": lambda: {
        "train_dataset": IterableDataset.from_generator(lambda: iter(token_rows(40))),
        "data_collator": collator(),
    },
    "torch stream": lambda: {"train_dataset": Stream(token_rows(40)), "data_collator": collator()},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model("llama", tmp_path_factory.mktemp("llama"))


def compare(folder, settings, keywords, lora=None, **options):
    (theirs, their), (ours, our) = run_both(lambda: load(folder, lora, **options), settings, keywords)
    assert_same_log(untimed(theirs), untimed(ours), relative=RELATIVE)
    return their, our


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_rows(folder, kind):
    stream = {"max_steps": 4} if "stream" in kind else {}
    _, ours = compare(folder, SETTINGS | stream, KINDS[kind])
    assert len(ours.state.log_history) == 5


def test_kinds_were_seen():
    assert len(KINDS) == 17
