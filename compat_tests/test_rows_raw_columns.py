"""remove_unused_columns=False: the user's collator gets the raw columns, as TRL has left them."""

import json

import numpy as np
import pytest
from datasets import Dataset
from pairs import SILENT, assert_same_curve, run_both, tiny_model, tokenizer
from sampling import sampled
from trl import SFTConfig, SFTTrainer

from hf_mlx import MLXSFTTrainer

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("uncompiled")]

# As in test_trajectory_families: the promise of the library in fp32.
RELATIVE, WEIGHTS = 1e-4, 1e-3
SETTINGS = {
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "learning_rate": 1e-2,
    "max_steps": 3,
    "logging_steps": 1,
    "max_length": 24,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "remove_unused_columns": False,
    "train_sampling_strategy": "sequential",
}
WORDS = ["the model learns", "a curve", "what it means to each", "of us and writes"]
SKIP = {"dataset_kwargs": {"skip_prepare_dataset": True}}


def turns(role, content, asked, answered):
    return [[{role: asked, content: "what is it"}, {role: answered, content: word}] for word in WORDS]


def add(**columns):
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


WEIGHT = [1.0, 2.0, 3.0, 4.0]
IDS = [[5, 6, 7, 8], [9, 10], [11, 12, 13], [14, 15, 16, 17, 18]]
MASKS = [[0, 1, 1, 1], [0, 1], [0, 0, 1], [0, 0, 0, 1, 1]]

# name: (rows, settings, keywords)
CASES = {
    "text": (add(text=WORDS, weight=WEIGHT), {}, {}),
    "another field": (add(body=WORDS, weight=WEIGHT), {"dataset_text_field": "body"}, {}),
    "messages": (add(messages=turns("role", "content", "user", "assistant"), source=WORDS), {}, {}),
    "turns": (add(conversations=turns("from", "value", "user", "assistant"), source=WORDS), {}, {}),
    "pairs": (add(prompt=["what "] * 4, completion=WORDS, weight=WEIGHT), {}, {}),
    "dialogues": (
        add(
            prompt=[[{"role": "user", "content": "x"}]] * 4,
            completion=[[{"role": "assistant", "content": word}] for word in WORDS],
        ),
        {},
        {},
    ),
    "formatted": (add(body=WORDS, weight=WEIGHT), {}, {"formatting_func": lambda row: f"so {row['body']}"}),
    "tokens": (add(input_ids=IDS, weight=WEIGHT), {}, {}),
    "masks": (add(input_ids=IDS, completion_mask=MASKS, weight=WEIGHT), {"completion_only_loss": True}, {}),
    "masks that do not count": (
        add(input_ids=IDS, completion_mask=MASKS, weight=WEIGHT),
        {"completion_only_loss": False},
        {},
    ),
    "labels": (add(input_ids=IDS, labels=IDS, source=WORDS), {}, {}),
    "packed": (add(text=WORDS, weight=WEIGHT), {"packing": True, "packing_strategy": "wrapped"}, {}),
    "prepared by their owner": (add(text=WORDS, input_ids=IDS, weight=WEIGHT), SKIP, {}),
    "cut and dropped": (
        add(prompt=["what ", "w " * 40, "so ", "x "], completion=WORDS, weight=WEIGHT),
        {"max_length": 12},
        {},
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model("llama", tmp_path_factory.mktemp("base"), hidden_size=32, intermediate_size=48)


def collator(seen):
    def collate(rows):
        seen.append([dict(row) for row in rows])
        width = max(len(row["input_ids"]) for row in rows)
        batch = {key: np.full((len(rows), width), fill) for key, fill in (("input_ids", 2), ("labels", -100))}
        batch["attention_mask"] = np.zeros((len(rows), width), np.int64)
        for place, row in enumerate(rows):
            size = len(row["input_ids"])
            batch["input_ids"][place, :size], batch["labels"][place, :size] = row["input_ids"], row["labels"]
            batch["attention_mask"][place, :size] = 1
        return batch

    return collate


def gather(trainer, model, out, name, stream=False, **changes):
    import torch

    rows, settings, keywords = CASES[name]
    seen = []
    collate = collator(seen)
    data = Dataset.from_list(rows)
    if name == "prepared by their owner":
        data = data.add_column("labels", IDS)
    made = trainer(
        str(model),
        SFTConfig(output_dir=str(out), **{**SILENT, **SETTINGS, **settings, **changes}),
        train_dataset=data.to_iterable_dataset() if stream else data,
        eval_dataset=data,
        data_collator=lambda rows: {key: torch.tensor(value) for key, value in collate(rows).items()},
        **keywords,
    )
    made.train()
    return seen


def assert_same_rows(theirs, ours):
    """What each collator was given; torch's loaders collate a micro-batch ahead, so their order says nothing."""
    found = [{json.dumps(row, sort_keys=True) for rows in seen for row in rows} for seen in (theirs, ours)]
    assert found[0] == found[1]
    assert found[0]


FEW = ("messages", "turns", "pairs", "formatted", "masks", "labels", "packed", "prepared by their owner")


@pytest.mark.parametrize("name", sampled(CASES, *FEW))
def test_the_collator_sees_trl_s_rows(name, model, tmp_path):
    assert_same_rows(*(gather(kind, model, tmp_path / kind.__name__, name) for kind in (SFTTrainer, MLXSFTTrainer)))


STREAMED = ("text", "turns", "pairs", "formatted", "masks that do not count")


@pytest.mark.parametrize("name", sampled(STREAMED, "turns", "formatted", "masks that do not count"))
def test_of_a_stream_too(name, model, tmp_path):
    kinds = (SFTTrainer, MLXSFTTrainer)
    assert_same_rows(*(gather(kind, model, tmp_path / kind.__name__, name, stream=True) for kind in kinds))


def test_without_it_they_are_removed(model, tmp_path):
    seen = gather(MLXSFTTrainer, model, tmp_path, "text", remove_unused_columns=True)
    assert seen and all(set(row) == {"input_ids", "labels"} for rows in seen for row in rows)


def test_a_collator_that_tokenizes_by_itself(model):
    import torch

    known = tokenizer()

    def collate(rows):
        batch = known([row["story"] for row in rows], padding=True, return_tensors="pt", padding_side="right")
        labels = torch.where(batch["attention_mask"] == 0, -100, batch["input_ids"])
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}

    settings = {key: value for key, value in SETTINGS.items() if "eval" not in key} | SKIP
    for rows in (Dataset.from_dict({"story": WORDS}), Dataset.from_dict({"story": WORDS}).to_iterable_dataset()):
        theirs, ours = run_both(model, settings, rows, None, data_collator=collate)
        assert assert_same_curve(theirs, ours, relative=RELATIVE, weights=WEIGHTS) >= 10
