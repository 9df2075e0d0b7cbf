"""dataloader_drop_last: what upstream leaves out of training, evaluation and prediction is left out here."""

import logging
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from pairs import SILENT, TIMED, rows_of, text_rows, tiny_model
from peft import LoraConfig
from sampling import sampled
from trl import SFTConfig, SFTTrainer

from hf_mlx import MLXSFTTrainer

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("uncompiled")]

# As in test_trajectory_families: the promise of the library in fp32.
RELATIVE = 1e-4
SETTINGS = {
    "dataloader_drop_last": True,
    "per_device_train_batch_size": 2,
    "max_steps": 4,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "max_length": 64,
}
SCHEDULE = {"train_sampling_strategy": "group_by_length"}

# name: (rows of evaluation, settings)
CASES = {
    "a short last batch": (7, {"per_device_eval_batch_size": 3}),
    "whole batches": (6, {"per_device_eval_batch_size": 3}),
    "one batch and one row": (5, {"per_device_eval_batch_size": 4}),
    "no whole batch": (3, {"per_device_eval_batch_size": 4}),
    "grouped by length": (7, {"per_device_eval_batch_size": 2, **SCHEDULE}),
    "packed": (11, {"per_device_eval_batch_size": 2, "packing": True}),
    "wrapped": (11, {"per_device_eval_batch_size": 2, "packing": True, "packing_strategy": "wrapped"}),
    "padding-free": (7, {"per_device_eval_batch_size": 3, "padding_free": True, "max_length": None}),
    "kept": (7, {"per_device_eval_batch_size": 3, "dataloader_drop_last": False}),
    "an epoch": (
        7,
        {"per_device_eval_batch_size": 2, "max_steps": -1, "num_train_epochs": 2, "eval_strategy": "epoch"},
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model("llama", tmp_path_factory.mktemp("base"), hidden_size=32, intermediate_size=48)


def make(trainer, model, out, train, evaluation, **settings):
    return trainer(
        str(model),
        SFTConfig(output_dir=str(out), **{**SILENT, **SETTINGS, **settings}),
        train_dataset=train,
        eval_dataset=evaluation,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )


def timeless(metrics):
    # The key that says how long transformers' accelerate took is upstream's alone.
    return {
        k: v
        for k, v in metrics.items()
        if not any(part in k for part in (*TIMED, "total_flos", "model_preparation_time"))
    }


def assert_same(theirs, ours):
    assert list(theirs) == list(ours)
    for key, value in theirs.items():
        assert ours[key] == pytest.approx(value, rel=RELATIVE), key
    return len(theirs)


def assert_same_history(theirs, ours):
    assert len(theirs) == len(ours)
    return sum(assert_same(timeless(a), timeless(b)) for a, b in zip(theirs, ours, strict=True))


FEW = ("a short last batch", "no whole batch", "grouped by length", "wrapped", "padding-free", "an epoch")


@pytest.mark.parametrize("name", sampled(CASES, *FEW))
def test_every_log_entry_is_trl_s(name, model, tmp_path):
    count, settings = CASES[name]
    made = []
    for side, trainer in (("theirs", SFTTrainer), ("ours", MLXSFTTrainer)):
        train, held_out = Dataset.from_list(text_rows(9)), Dataset.from_list(rows_of("text", count, seed=5))
        made.append(make(trainer, model, tmp_path / side, train, held_out, **settings))
        made[-1].train()
        made[-1].evaluate()
    theirs, ours = made
    assert assert_same_history(theirs.state.log_history, ours.state.log_history) > 20


def test_a_stream_keeps_its_last_batch(model, tmp_path):
    histories = []
    for side, trainer in (("theirs", SFTTrainer), ("ours", MLXSFTTrainer)):
        train = Dataset.from_list(text_rows(5)).to_iterable_dataset()
        held_out = Dataset.from_list(rows_of("text", 5, seed=5)).to_iterable_dataset()
        made = make(trainer, model, tmp_path / side, train, held_out, per_device_eval_batch_size=2, max_steps=7)
        made.train()
        histories.append(made.state.log_history)
    assert assert_same_history(*histories) > 20


@pytest.mark.parametrize("count", sampled([3, 7, 8], 3, 7))
def test_predictions_are_of_whole_batches(count, model, tmp_path):
    rows = Dataset.from_list(rows_of("text", count, seed=6))
    outputs = []
    for side, trainer in (("theirs", SFTTrainer), ("ours", MLXSFTTrainer)):
        made = make(
            trainer, model, tmp_path / side, Dataset.from_list(text_rows(9)), rows, per_device_eval_batch_size=4
        )
        test: Any = made.eval_dataset if side == "theirs" else rows  # trl's predict() takes prepared rows alone
        outputs.append(made.predict(test))
    theirs, ours = outputs
    assert_same(timeless(theirs.metrics), {k: v for k, v in timeless(ours.metrics).items() if k in theirs.metrics})
    if count < 4:
        assert theirs.predictions is None and ours.predictions is None
        return
    assert np.array_equal(theirs.label_ids, ours.label_ids)
    assert theirs.predictions.shape == ours.predictions.shape
    trained = theirs.label_ids != -100
    assert trained.sum() > 20
    assert np.abs(theirs.predictions - ours.predictions)[trained].max() < 1e-3


def test_an_evaluation_that_measured_nothing_says_so(model, tmp_path, caplog):
    rows = Dataset.from_list(rows_of("text", 3, seed=5))
    made = make(MLXSFTTrainer, model, tmp_path, Dataset.from_list(text_rows(9)), rows, per_device_eval_batch_size=4)
    with caplog.at_level(logging.WARNING):
        assert "eval_loss" not in made.evaluate()
    assert "dataloader_drop_last" in caplog.text
