"""What a TrainerCallback sees: the same events, in the same order, with the same state, as in TRL's trainer."""

from __future__ import annotations

import math
from typing import Any

import pytest
from datasets import Dataset
from pairs import SILENT, assert_same_curve, rows_of, run_mlx, run_trl, text_rows, tiny_model
from peft import LoraConfig
from sampling import sampled
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from hf_mlx import MLXSFTTrainer
from hf_mlx.errors import TrainingError

# As in test_trajectory_families: the promise of the library in fp32.
RELATIVE = 1e-4
WEIGHTS = 1e-3

SETTINGS = {
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 2,
    "learning_rate": 1e-3,
    "logging_steps": 2,
    "gradient_checkpointing": False,
    "max_length": 32,
}
LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["o_proj"], "task_type": "CAUSAL_LM"}
# 5 micro-batches an epoch: 2, 2 and a partial window of 1; the last micro-batch is a row short.
ROWS = text_rows(9)
EVALUATED = text_rows(3, seed=1)

EVENTS = [
    "on_init_end",
    "on_train_begin",
    "on_epoch_begin",
    "on_step_begin",
    "on_substep_end",
    "on_pre_optimizer_step",
    "on_optimizer_step",
    "on_step_end",
    "on_log",
    "on_prediction_step",
    "on_evaluate",
    "on_save",
    "on_epoch_end",
    "on_train_end",
]
FLAGS = ("should_training_stop", "should_epoch_stop", "should_save", "should_evaluate", "should_log")


class Recorder(TrainerCallback):
    """Writes down every event, and raises one flag when it sees a given event for the given time.

    Args:
        event: Where to interfere; None to watch only.
        flag: Attribute of ``control`` that is set to True there.
        time: Which occurrence of the event, counted from 1.
    """

    def __init__(self, event: str | None = None, flag: str = "", time: int = 1) -> None:
        self.trigger, self.flag, self.time = event, flag, time
        self.seen: list[tuple[Any, ...]] = []

    def record(self, event: str, state: Any, control: Any, given: dict[str, Any]) -> None:
        flags = [flag for flag in FLAGS if getattr(control, flag)]
        counts = (state.global_step, state.epoch, state.max_steps, state.num_train_epochs, state.train_batch_size)
        told = {key: list(given[key]) if key in ("logs", "metrics") else given[key] is None for key in sorted(given)}
        self.seen.append((event, *counts, flags, told))
        if event == self.trigger:
            self.time -= 1
            if self.time == 0:
                setattr(control, self.flag, True)


def _watch(event: str) -> Any:
    def method(self: Recorder, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.record(event, state, control, given)

    return method


for _event in EVENTS:
    setattr(Recorder, _event, _watch(_event))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model("llama", tmp_path_factory.mktemp("llama"), hidden_size=32, num_hidden_layers=1)


def watch_both(model: Any, settings: dict[str, Any], *trigger: Any, rows: Any = ROWS, **keywords: Any) -> list[str]:
    """Run both with a Recorder, assert that they saw and logged the same; returns the names of the events."""
    settings = {**SETTINGS, **settings}
    keywords.setdefault("eval_dataset", Dataset.from_list(EVALUATED))
    watchers = Recorder(*trigger), Recorder(*trigger)
    theirs = run_trl(model, settings, rows, LORA, callbacks=[watchers[0]], **keywords)
    ours = run_mlx(model, settings, rows, LORA, callbacks=[watchers[1]], **keywords)
    assert [seen[0] for seen in watchers[1].seen] == [seen[0] for seen in watchers[0].seen]
    for number, (a, b) in enumerate(zip(watchers[0].seen, watchers[1].seen, strict=True)):
        assert b == a, f"event {number}"
    assert [list(entry) for entry in ours.history] == [list(entry) for entry in theirs.history]
    assert_same_curve(theirs, ours, relative=RELATIVE, weights=WEIGHTS)
    return [seen[0] for seen in watchers[0].seen]


STRATEGIES: dict[str, dict[str, Any]] = {
    "nothing": {"logging_strategy": "no"},
    "steps": {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 3},
    "steps, not at the end": {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4},
    "epoch": {"eval_strategy": "epoch", "save_strategy": "epoch", "logging_strategy": "epoch"},
    "steps and epoch": {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "epoch"},
    "epoch and steps": {"eval_strategy": "epoch", "save_strategy": "steps", "save_steps": 2, "logging_steps": 1},
    "best": {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best", "metric_for_best_model": "loss"},
    "best of epochs": {"eval_strategy": "epoch", "save_strategy": "best", "metric_for_best_model": "eval_loss"},
    "ratios": {"eval_strategy": "steps", "eval_steps": 0.3, "save_strategy": "steps", "save_steps": 0.5},
    "on start": {"eval_on_start": True, "eval_strategy": "epoch", "logging_first_step": True},
    "delayed": {"eval_strategy": "steps", "eval_steps": 1, "eval_delay": 3},
    "no accumulation": {"gradient_accumulation_steps": 1, "eval_strategy": "steps", "eval_steps": 4},
    "window longer than the epoch": {"gradient_accumulation_steps": 8, "eval_strategy": "epoch"},
    "whole windows": {"gradient_accumulation_steps": 2, "dataloader_drop_last": True, "save_strategy": "epoch"},
    "stops inside an epoch": {"max_steps": 4, "eval_strategy": "epoch", "save_strategy": "epoch"},
    "part of an epoch": {"num_train_epochs": 1.5, "eval_strategy": "steps", "eval_steps": 3},
    "more epochs than asked for": {"max_steps": 7, "eval_strategy": "steps", "eval_steps": 5},
    "tokens seen": {"include_num_input_tokens_seen": "non_padding", "logging_steps": 1},
    "all tokens seen": {"include_num_input_tokens_seen": "all"},
}


FEW = (
    "steps", "epoch and steps", "best", "ratios", "on start", "delayed", "window longer than the epoch",
    "stops inside an epoch", "all tokens seen",
)  # fmt: skip


@pytest.mark.parametrize("name", sampled(STRATEGIES, *FEW))
def test_strategies(name, model):
    seen = watch_both(model, STRATEGIES[name])
    assert seen.count("on_step_end") >= 2
    assert ("on_evaluate" in seen) == ("eval_strategy" in STRATEGIES[name])
    assert ("on_save" in seen) == ("save_strategy" in STRATEGIES[name])


BUSY = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}


@pytest.mark.parametrize(
    "event", sampled(EVENTS[1:-1], "on_train_begin", "on_substep_end", "on_step_end", "on_prediction_step", "on_save")
)
def test_stop_at_any_event(event, model):
    seen = watch_both(model, BUSY, event, "should_training_stop")
    assert seen[-1] == "on_train_end"
    assert seen.count("on_step_end") < 6


@pytest.mark.parametrize("event", sampled(EVENTS[2:-2], "on_step_begin", "on_substep_end", "on_evaluate"))
def test_end_the_epoch_at_any_event(event, model):
    seen = watch_both(model, BUSY, event, "should_epoch_stop", 2)
    assert seen.count("on_epoch_end") == 2


@pytest.mark.parametrize("flag", ["should_log", "should_evaluate", "should_save"])
@pytest.mark.parametrize(
    "event",
    sampled(["on_step_end", "on_epoch_end", "on_optimizer_step", "on_substep_end"], "on_step_end", "on_substep_end"),
)
def test_ask_for_an_action(event, flag, model):
    watch_both(model, {"logging_steps": 100}, event, flag, 2)


def test_several_evaluation_sets(model):
    sets = {"near": Dataset.from_list(EVALUATED), "far": Dataset.from_list(text_rows(4, seed=2))}
    settings = {"eval_strategy": "epoch", "save_strategy": "best", "metric_for_best_model": "far_loss"}
    seen = watch_both(model, settings, eval_dataset=sets)
    assert seen.count("on_evaluate") == 4


def describe(prediction: Any) -> dict[str, float]:
    """Numbers that change with anything in a prediction, as numpy scalars.

    What a model says after the end of a row is left out: nobody reads it, and torch's mask makes it another number.
    """
    real = prediction.label_ids != -100
    hits = prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]
    return {
        "hits": hits[real[:, 1:]].mean(),
        "rows": float(prediction.predictions.shape[0]),
        "width": float(prediction.predictions.shape[1]),
        "size": abs(prediction.predictions[real]).mean(),
        "eval_named": 1.0,
        "labels": float(prediction.label_ids.sum()),
    }


def describe_ids(prediction: Any) -> dict[str, float]:
    """As :func:`describe`, of what :func:`choose` kept."""
    chosen = prediction.predictions[prediction.label_ids != -100]
    return {"chosen": float(chosen.sum()), "width": float(prediction.predictions.shape[1])}


def choose(logits: Any, labels: Any) -> Any:
    """Keep the index of the largest logit alone, as scripts do to save memory."""
    return logits.argmax(-1)


@pytest.mark.parametrize(("compute", "keep"), [(describe, None), (describe_ids, choose)])
def test_compute_metrics(compute, keep, model):
    settings = {"eval_strategy": "epoch"}
    watch_both(model, settings, compute_metrics=compute, preprocess_logits_for_metrics=keep)


@pytest.mark.parametrize("steps", [3, 6])
def test_stream(steps, model):
    settings = {"max_steps": steps, "eval_strategy": "steps", "eval_steps": 2, "logging_steps": 1}
    rows = Dataset.from_list(rows_of("prompt", 9)).to_iterable_dataset()
    seen = watch_both(model, settings, rows=rows, eval_dataset=Dataset.from_list(rows_of("prompt", 3, seed=1)))
    assert seen.count("on_step_end") == steps


def _burn(cls: type, model: Any, folder: Any, **settings: Any) -> Any:
    """A trainer whose decay overflows in its first step, so that the loss of the second is no number."""
    settings = {**SETTINGS, **SILENT, "learning_rate": 1e38, "weight_decay": 10.0, **settings}
    settings |= {"lr_scheduler_type": "constant", "logging_steps": 1}
    args = SFTConfig(str(folder), **settings)
    return cls(str(model), args, train_dataset=Dataset.from_list(ROWS), peft_config=LoraConfig(**LORA))


def test_a_loss_that_is_no_number_stops_the_run_at_once(model, tmp_path):
    trainer = _burn(MLXSFTTrainer, model, tmp_path)
    with pytest.raises(TrainingError, match=r"a loss of (nan|inf) at step 2 \(learning_rate=1e\+38\)"):
        trainer.train()
    # The device is never waited for between two steps, so one more may have begun.
    assert trainer.state.global_step <= 3
    assert [entry["step"] for entry in trainer.state.log_history] == [1]


def test_a_loss_that_is_no_number_is_logged_where_that_is_asked_for(model, tmp_path):
    trainer = _burn(MLXSFTTrainer, model, tmp_path / "ours", logging_nan_inf_filter=False)
    with pytest.warns(UserWarning, match=r"the loss is (nan|inf) at step 2"):
        trainer.train()
    reference = _burn(SFTTrainer, model, tmp_path / "theirs", logging_nan_inf_filter=False)
    reference.train()
    finite = [
        [math.isfinite(entry["loss"]) for entry in state.log_history if "loss" in entry]
        for state in (reference.state, trainer.state)
    ]
    assert finite[0] == finite[1] == [True] + [False] * 5
