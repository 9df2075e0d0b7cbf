"""Micro-batches without a trained token, in training and in evaluation: the run goes on, with TRL's log."""

from typing import Any

import numpy as np
import pytest
from architecture_zoo import make_model
from datasets import Dataset
from pairs import SILENT, assert_same_log, tiny_model, tokenizer, untimed
from peft import LoraConfig
from sampling import sampled
from trl import SFTConfig, SFTTrainer

from hf_mlx import MLXSFTTrainer
from hf_mlx.training import linear_cross_entropy

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("uncompiled")]

# As in test_trajectory_families: the promise of the library in fp32.
RELATIVE = 1e-4
SETTINGS = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "learning_rate": 1e-2,
    "num_train_epochs": 2,
    "logging_steps": 1,
    "eval_strategy": "epoch",
    "max_length": 24,
    "train_sampling_strategy": "sequential",
}
# The first prompt fills a row by itself, and so does the third.
LONG = [
    {"prompt": "w " * 40, "completion": "b c d"},
    {"prompt": "hi ", "completion": "there you"},
    {"prompt": "x " * 60, "completion": "fine by me"},
    {"prompt": "a", "completion": "b " * 5},
    {"prompt": "to ", "completion": "each of us"},
]
TOKENS = [
    {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, 8, 9]},
    {"input_ids": [15, 16, 17], "labels": [-100] * 3},
    {"input_ids": [25, 26, 27, 28], "labels": [25, -100, -100, -100]},  # only what nothing predicts
    {"input_ids": [35, 36, 37, 38], "labels": [-100, 36, 37, -100]},
    {"input_ids": [45, 46], "labels": [-100, -100]},
]
PACKED = {"packing": True}
# 49 tokens in rows of 24: the third row is one token.
STREAM = [{"input_ids": list(range(5, 30)), "labels": list(range(5, 30))}, {"input_ids": list(range(30, 54))}]
STREAM[1]["labels"] = STREAM[1]["input_ids"]
WRAPPED = {"packing": True, "packing_strategy": "wrapped"}
MASKED = {"max_length": None}
UNFILTERED = {"logging_nan_inf_filter": False}
SMOOTH = {"label_smoothing_factor": 0.1}

# name: (rows, settings)
CASES = {
    "packed prompts": (LONG, PACKED),
    "packed prompts, dft": (LONG, {**PACKED, "loss_type": "dft"}),
    "packed prompts, smoothed": (LONG, {**PACKED, **SMOOTH}),
    "packed prompts, accumulated": (LONG, {**PACKED, "gradient_accumulation_steps": 2}),
    "packed prompts, smoothed, accumulated": (LONG, {**PACKED, **SMOOTH, "gradient_accumulation_steps": 2}),
    "a wrapped tail": (STREAM, WRAPPED),
    "a wrapped tail, dft": (STREAM, {**WRAPPED, "loss_type": "dft"}),
    "a wrapped tail, smoothed": (STREAM, {**WRAPPED, **SMOOTH}),
    "masked rows": (TOKENS, MASKED),
    "masked rows, pairs": (TOKENS, {**MASKED, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}),
    "masked rows, smoothed": (TOKENS, {**MASKED, **SMOOTH, "logging_steps": 3}),
    "masked rows, smoothed, logged rarely": (TOKENS, {**MASKED, **SMOOTH, "logging_steps": 4}),
    "masked rows, smoothed, unfiltered": (TOKENS, {**MASKED, **SMOOTH, **UNFILTERED}),
    "masked rows, dft": (TOKENS, {**MASKED, "loss_type": "dft"}),
    "masked rows, padding-free": (TOKENS, {**MASKED, "padding_free": True}),
    "only masked rows in evaluation": (TOKENS, {**MASKED, "eval_on_start": True}),
    "only masked rows in evaluation, smoothed": (TOKENS, {**MASKED, **SMOOTH}),
    "weight decay and momentum": (LONG, {**PACKED, "weight_decay": 0.1, "optim": "rmsprop"}),
}
BLOCKS = ["packed prompts", "masked rows, smoothed", "packed prompts, dft", "a wrapped tail"]
ROUTED = ["packed prompts", "masked rows", "masked rows, smoothed", "packed prompts, accumulated"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_model("llama", tmp_path_factory.mktemp("llama"), hidden_size=32, intermediate_size=48)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixtral")
    model: Any = make_model("mixtral", vocab_size=len(tokenizer()))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def run(trainer, model, out, name, lora=True, **settings):
    rows, changes = CASES[name]
    held_out = [row for row in TOKENS if set(row["labels"]) == {-100}] if "only masked" in name else rows
    if "only masked" in name:
        rows = [TOKENS[0], TOKENS[3]]
    made = trainer(
        str(model),
        SFTConfig(output_dir=str(out), **{**SILENT, **SETTINGS, **changes, **settings}),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(held_out),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM") if lora else None,
    )
    made.train()
    return untimed(made.state.log_history)


def assert_same(theirs, ours):
    assert_same_log(theirs, ours, relative=RELATIVE, nan_ok=True)
    return [entry for entry in theirs if entry.get("loss") == 0 or entry.get("mean_token_accuracy") == 0]


def both(model, folder, name, **options):
    return [
        run(trainer, model, folder / side, name, **options)
        for side, trainer in (("theirs", SFTTrainer), ("ours", MLXSFTTrainer))
    ]


FEW = (
    "packed prompts", "packed prompts, smoothed, accumulated", "a wrapped tail, dft", "masked rows, pairs",
    "masked rows, smoothed, logged rarely", "masked rows, smoothed, unfiltered", "masked rows, padding-free",
    "only masked rows in evaluation", "weight decay and momentum",
)  # fmt: skip


@pytest.mark.parametrize("name", sampled(CASES, *FEW))
def test_the_log_is_trl_s(name, llama, tmp_path):
    theirs, ours = both(llama, tmp_path, name)
    assert_same(theirs, ours)
    assert len(ours) > 3


def test_there_are_steps_without_a_trained_token(llama, tmp_path):
    for number, name in enumerate(("packed prompts", "a wrapped tail", "masked rows")):
        history = run(MLXSFTTrainer, llama, tmp_path / str(number), name)
        empty = [entry for entry in history if entry.get("loss") == 0]
        assert empty and all(entry["grad_norm"] == 0 and entry["mean_token_accuracy"] == 0 for entry in empty)


@pytest.mark.parametrize("name", sampled(BLOCKS, "masked rows, smoothed", "a wrapped tail"))
def test_in_blocks(name, llama, tmp_path, monkeypatch):
    monkeypatch.setattr(linear_cross_entropy, "BLOCK_LOGITS", 1)
    monkeypatch.setattr(linear_cross_entropy, "BLOCK_ROWS", 4)
    theirs, ours = both(llama, tmp_path, name, lora=False)
    assert_same(theirs, ours)


@pytest.mark.parametrize("name", sampled(ROUTED, "masked rows, smoothed", "packed prompts, accumulated"))
def test_with_routers(name, mixtral, tmp_path):
    theirs, ours = both(mixtral, tmp_path, name, router_aux_loss_coef=0.5)
    assert_same(theirs, ours)
    assert any("aux_loss" in entry for entry in ours)


def test_rows_that_keep_their_places(llama, tmp_path):
    """compute_metrics needs the collator's own rows, which no shape was chosen for."""
    outputs = []
    for side, trainer in (("theirs", SFTTrainer), ("ours", MLXSFTTrainer)):
        made = trainer(
            str(llama),
            SFTConfig(output_dir=str(tmp_path / side), **{**SILENT, **SETTINGS, **MASKED}),
            train_dataset=Dataset.from_list(TOKENS),
            eval_dataset=Dataset.from_list(TOKENS),
            compute_metrics=lambda p: {"labels": int(np.sum(p.label_ids != -100))},
        )
        outputs.append(made.evaluate())
    theirs, ours = outputs
    assert theirs["eval_labels"] == ours["eval_labels"] == 6
    assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=RELATIVE)
