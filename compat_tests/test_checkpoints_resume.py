"""A run that stops and goes on is the run that did not stop: weights to the bit, and the log."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_runs import make_trainer, timeless
from pairs import tiny_model
from sampling import sampled
from transformers import EarlyStoppingCallback, TrainerCallback

from hf_mlx.cli.main import main as cli
from hf_mlx.errors import CheckpointError


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def train(model: Path, folder: Path, resume: Any = None, **settings: Any) -> Any:
    trainer = make_trainer(model, folder, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def assert_same(a: Any, b: Any) -> None:
    assert_same_weights(a, b)
    assert timeless(a.state.log_history) == timeless(b.state.log_history)


def assert_same_weights(a: Any, b: Any) -> None:
    ours, theirs = a.session.step.params, b.session.step.params
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert np.array_equal(np.array(value), np.array(theirs[name])), name


# What a position, an order or a state could be lost in.
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "full": {"lora": False},
    "accumulation that does not divide": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3},
    "logs between checkpoints": {"logging_steps": 5, "save_steps": 2},
    "by epoch": {"logging_strategy": "epoch", "eval_strategy": "epoch", "save_steps": 3},
    "saved by epoch": {"eval_strategy": "epoch", "save_strategy": "epoch"},
    "torch's global sampler": {"accelerator_config": {"use_seedable_sampler": False}},
    "grouped by length": {"train_sampling_strategy": "group_by_length"},
    "packed": {"packing": True, "max_length": 64},
    "adafactor": {"optim": "adafactor"},
    "momentum": {"optim": "sgd", "optim_args": "momentum=0.9,dampening=0.3"},
    "lion": {"optim": "lion_32bit"},
    "plateau": {
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5, "threshold": 0.9},
        "warmup_steps": 0,
        "metric_for_best_model": "eval_loss",
    },
}


FEW = (
    "full", "accumulation that does not divide", "by epoch", "torch's global sampler", "packed", "plateau",
)  # fmt: skip


@pytest.mark.parametrize("variant", sampled(VARIANTS, *FEW))
def test_every_checkpoint_leads_to_the_same_end(model, tmp_path, variant):
    settings = {"save_total_limit": None, "save_steps": 5, "include_num_input_tokens_seen": "all", **VARIANTS[variant]}
    whole = train(model, tmp_path / "whole", **settings)
    folders = sorted((tmp_path / "whole").glob("checkpoint-*"))
    assert len(folders) >= 2
    for folder in folders:
        assert_same(train(model, tmp_path / folder.name, str(folder), **settings), whole)


def test_a_finished_run_trains_no_further(model, tmp_path):
    whole = train(model, tmp_path)
    again = train(model, tmp_path, True)
    assert again.state.global_step == whole.state.global_step == 14
    assert_same(again, whole)


def test_more_steps_go_on_where_the_shorter_run_ended(model, tmp_path):
    settings = {"lr_scheduler_type": "constant", "warmup_steps": 0}
    train(model, tmp_path / "short", max_steps=7, **settings)
    longer = train(model, tmp_path / "longer", str(tmp_path / "short" / "checkpoint-7"), **settings)
    # The logs differ: a run evaluates after its last step, and the shorter one had one earlier.
    assert_same_weights(longer, train(model, tmp_path / "whole", **settings))


class Stop(TrainerCallback):
    """Raises, or sends SIGINT, at one event of one step."""

    def __init__(self, event: str, step: int, *, by_signal: bool = False) -> None:
        self.step, self.by_signal = step, by_signal
        setattr(self, event, self._stop)

    def _stop(self, args, state, control, **keywords) -> None:
        if state.global_step == self.step and self.by_signal:
            os.kill(os.getpid(), signal.SIGINT)
        elif state.global_step == self.step:
            raise KeyboardInterrupt


EVENTS = ["on_step_begin", "on_substep_end", "on_step_end", "on_log", "on_prediction_step", "on_evaluate"]
UNSAVED = {"save_strategy": "no", "logging_steps": 2, "eval_steps": 4}


@pytest.fixture(scope="module")
def uninterrupted(model, tmp_path_factory) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return train(model, tmp_path_factory.mktemp("whole"), **UNSAVED)


@pytest.mark.parametrize("by_signal", [False, True], ids=["raised", "pressed"])
@pytest.mark.parametrize("event", sampled(EVENTS, "on_substep_end", "on_step_end", "on_prediction_step"))
def test_ctrl_c_saves_a_checkpoint_and_says_how_to_go_on(model, uninterrupted, tmp_path, event, by_signal, caplog):
    settings = UNSAVED
    stop = Stop(event, 8, by_signal=by_signal)
    with pytest.raises(KeyboardInterrupt), caplog.at_level(logging.WARNING):
        train(model, tmp_path / "out", callbacks=[stop], **settings)
    (folder,) = (tmp_path / "out").glob("checkpoint-*")
    assert f"saved as {folder.name}" in caplog.text and "resume_from_checkpoint=True" in caplog.text
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert_same(train(model, tmp_path / "out", True, **settings), uninterrupted)


def test_the_second_ctrl_c_does_not_wait(model, tmp_path):
    class Twice(TrainerCallback):
        def on_step_begin(self, args, state, control, **keywords):
            if state.global_step == 5:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(model, tmp_path, save_strategy="no", callbacks=[Twice()])


class Watch(TrainerCallback):
    """Notes the checkpoints there are after each save, and leaves a file of its own in the last one."""

    def __init__(self) -> None:
        self.seen: list[list[str]] = []

    def on_save(self, args, state, control, **keywords) -> None:
        folder = Path(args.output_dir)
        self.seen.append(sorted(path.name for path in folder.glob("checkpoint-*")))
        (folder / f"checkpoint-{state.global_step}" / "my_metrics.bin").write_bytes(b"mine")


def test_rotation_keeps_the_best_and_the_last(model, tmp_path):
    settings = {"eval_steps": 2, "save_steps": 2, "save_total_limit": 1, "load_best_model_at_end": True}
    metric = {"metric_for_best_model": "eval_loss", "greater_is_better": True}
    watch = Watch()
    trainer = train(model, tmp_path, callbacks=[watch], **settings, **metric)
    # The loss falls, so with greater_is_better the first evaluation is the best one.
    expected = [sorted({"checkpoint-2", f"checkpoint-{step}"}) for step in range(2, 15, 2)]
    assert watch.seen == expected
    # When it is over the limit is one again, as in transformers.
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    two = train(model, tmp_path / "two", eval_steps=2, save_strategy="no", callbacks=[StopAfter(2)])
    assert_same_weights(trainer, two)


class StopAfter(TrainerCallback):
    """Ends the training after a step, as its schedule goes on to more."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **keywords) -> None:
        control.should_training_stop |= state.global_step >= self.step


def test_what_a_callback_leaves_in_a_checkpoint_is_no_unknown_file(model, tmp_path):
    whole = train(model, tmp_path / "out", callbacks=[Watch()], save_total_limit=None, save_steps=7)
    assert_same(train(model, tmp_path / "again", str(tmp_path / "out" / "checkpoint-7"), save_steps=7), whole)


def test_save_strategy_best_saves_new_bests_alone(model, tmp_path):
    settings = {
        "save_strategy": "best",
        "eval_steps": 2,
        "save_total_limit": None,
        "metric_for_best_model": "eval_loss",
    }
    trainer = train(model, tmp_path, greater_is_better=False, **settings)
    values = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    bests = [2 * (i + 1) for i, value in enumerate(values) if value < min([float("inf"), *values[:i]])]
    saved = sorted(int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*"))
    assert saved == bests and len(bests) >= 2


def test_callbacks_go_on_with_their_state_when_asked(model, tmp_path):
    settings = {"metric_for_best_model": "eval_loss", "greater_is_better": True, "eval_steps": 2, "save_steps": 2}
    # Never better again after the first evaluation: patience 4 ends the run at step 10.
    whole = train(model, tmp_path / "whole", callbacks=[EarlyStoppingCallback(4)], save_total_limit=None, **settings)
    assert whole.state.global_step == 10
    folder = str(tmp_path / "whole" / "checkpoint-6")
    resumed = train(
        model,
        tmp_path / "resumed",
        folder,
        callbacks=[EarlyStoppingCallback(4)],
        restore_callback_states_from_checkpoint=True,
        **settings,
    )
    assert resumed.state.global_step == 10
    fresh = train(model, tmp_path / "fresh", folder, callbacks=[EarlyStoppingCallback(4)], **settings)
    assert fresh.state.global_step == 14


def test_weights_alone_are_refused_unless_asked_for(model, tmp_path, caplog):
    train(model, tmp_path, save_only_model=True, max_steps=7, save_steps=7, logging_steps=1)
    assert not list(tmp_path.glob("checkpoint-7/optimizer*"))
    with pytest.raises(CheckpointError, match="save_only_model=True"):
        train(model, tmp_path, True)
    with caplog.at_level(logging.WARNING):
        trainer = train(model, tmp_path, True, save_only_model=True)
    assert "begin anew" in caplog.text
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if entry.get("loss") and entry["step"] > 7]
    # The warmup of four steps starts again, as in transformers.
    assert rates[:5] == pytest.approx([0.0, 2.5e-4, 5e-4, 7.5e-4, 1e-3])


def test_a_changed_learning_rate_is_said(model, tmp_path, caplog):
    train(model, tmp_path / "a", max_steps=14)
    with caplog.at_level(logging.WARNING):
        resumed = train(model, tmp_path / "b", str(tmp_path / "a" / "checkpoint-13"), learning_rate=5.0)
    assert "learning_rate=5 has no effect" in caplog.text
    assert resumed.state.log_history[-1]["step"] == 14


@pytest.mark.parametrize("lora", sampled([True, False], True), ids=["lora", "full"])
def test_without_torch_the_same_state_is_written_and_read(model, tmp_path, monkeypatch, lora):
    whole = train(model, tmp_path / "whole", lora=lora)
    settings = {"lora": lora, "save_total_limit": None, "save_steps": 7}
    trainer = make_trainer(model, tmp_path / "out", **settings)
    resumed = make_trainer(model, tmp_path / "resumed", **settings)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "torch", None)
        trainer.train()
        folder = tmp_path / "out" / "checkpoint-7"
        assert not list(folder.glob("*.pt*")) and not (folder / "training_args.bin").exists()
        resumed.train(resume_from_checkpoint=str(folder))
    assert_same(trainer, whole)
    assert_same(resumed, whole)
    assert cli(["checkpoint", "to-torch", str(folder)]) == 0
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth"} <= {path.name for path in folder.iterdir()}
    assert not list(folder.glob("optimizer.json"))
    assert_same(train(model, tmp_path / "torch", str(folder), **settings), whole)
    assert cli(["checkpoint", "from-torch", str(folder)]) == 0
    assert not list(folder.glob("*.pt*"))
    assert_same(train(model, tmp_path / "back", str(folder), **settings), whole)
