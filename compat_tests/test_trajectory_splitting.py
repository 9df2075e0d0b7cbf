"""auto_find_batch_size: the curve of the run as it was written, on a device that cannot hold its micro-batches."""

from __future__ import annotations

import contextlib
import json
import math
import warnings

import mlx.core as mx
import numpy as np
import pytest
from accelerate.utils.memory import should_reduce_batch_size
from architecture_zoo import make_model
from datasets import Dataset
from pairs import SILENT, Run, assert_same_curve, mean_drift, rows_of, run_mlx, run_trl, tiny_model, tokenizer
from peft import LoraConfig
from sampling import sampled
from training_checks import make_base
from trl import SFTConfig, SFTTrainer

from hf_mlx import MLXSFTTrainer
from hf_mlx.errors import CheckpointError, TrainingError
from hf_mlx.models.architectures import accepts_loss_kwargs
from hf_mlx.surface.estimate import describe_run, estimate_memory
from hf_mlx.training.memory import planned_limit

# fp32 on both sides; the order of sums in a matmul is all that differs. 1e-4 is the promise of the library.
RELATIVE = 1e-4
WEIGHTS = 1e-3
# A wrong denominator moves every step the same way; rounding does not.
DRIFT = 1e-5
# Between our own runs: the same fp32 sums in another order, as in test_trajectory_equivalence.
OWN_RELATIVE = 3e-6
OWN_WEIGHTS = 1e-5

SETTINGS = {
    "per_device_train_batch_size": 5,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 2,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "logging_steps": 1,
    "gradient_checkpointing": False,
    "max_length": 96,
}
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
# 5, 5 | 5, 2: the last micro-batch of an epoch is a smaller one.
ROWS = rows_of("prompt", 17)
# All of one length, so that each is a row of its own, whatever rows documents are laid into, and all are cut alike.
EVEN = [{"input_ids": np.random.default_rng(row).integers(5, 300, 32).tolist()} for row in range(17)]
SAID = "[malloc] Unable to allocate 68719476736 bytes."


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_model("llama", tmp_path_factory.mktemp("llama"))


def make_trainer(model, folder, settings, lora=LORA, rows=ROWS, **keywords):
    args = SFTConfig(output_dir=str(folder), **{**SILENT, **SETTINGS, **settings})
    config = LoraConfig(**lora) if lora else None
    return MLXSFTTrainer(str(model), args, train_dataset=Dataset.from_list(rows), peft_config=config, **keywords)


@contextlib.contextmanager
def room_for(rows, model, folder, settings, lora, data=ROWS):
    """MLX's own limit at what ``rows`` rows of the longest length are estimated to take."""
    trainer = make_trainer(model, folder, settings, lora, data, processing_class=tokenizer())
    earlier = mx.set_memory_limit(2**40)
    try:
        mx.set_memory_limit(math.ceil(estimate_memory(trainer, rows).total * mx.get_memory_limit() / planned_limit()))
        yield
    finally:
        mx.set_memory_limit(earlier)


class Limited:
    """The objective of a device that has room for so many rows, and says it as MLX does."""

    def __init__(self, objective, room):
        self.objective, self.room, self.asked = objective, room, []

    def __getattr__(self, name):
        return getattr(self.objective, name)

    def __call__(self, params, arrays):
        self.asked.append(arrays["input_ids"].shape[0])
        if self.asked[-1] > self.room:
            raise RuntimeError(SAID)
        return self.objective(params, arrays)


def limit_rows(trainer, room):
    """Let the trainer's device run out of memory above ``room`` rows; what was asked of it comes back."""
    limited = Limited(trainer.session.step.objective, room)
    trainer.session.step.objective = limited
    return limited.asked


def read(trainer):
    return Run(trainer.state.log_history, {k: np.array(v) for k, v in trainer.session.step.params.items()})


CASES = {
    "completions": ("prompt", {}, LORA),
    "packed": ("text", {"packing": True, "max_length": 64, "per_device_train_batch_size": 3}, LORA),
    "all weights": ("messages", {"learning_rate": 1e-4}, None),
    "smoothed labels": ("prompt", {"label_smoothing_factor": 0.1, "gradient_checkpointing": True}, LORA),
}


@pytest.mark.parametrize("case", sampled(CASES, "packed", "all weights"))
def test_beside_trl(case, llama, tmp_path):
    kind, changed, lora = CASES[case]
    settings, rows = {**SETTINGS, **changed, "auto_find_batch_size": True}, rows_of(kind, 17)
    theirs = run_trl(llama, settings, rows, lora)
    with room_for(1, llama, tmp_path, settings, lora, rows):
        ours = run_mlx(llama, settings, rows, lora)
    assert assert_same_curve(theirs, ours, relative=RELATIVE, weights=WEIGHTS) >= 2 * 7
    assert abs(mean_drift(theirs, ours)) < DRIFT


def test_beside_trl_where_each_micro_batch_has_its_own_mean(tmp_path):
    base = make_base("gemma4", tmp_path / "base")
    # The text alone: what PEFT puts into the tower beside it is never trained.
    lora = {"r": 4, "lora_alpha": 8, "target_modules": r".*language_model\..*\.(q|v|o|up|down)_proj"}
    settings = {**SETTINGS, "auto_find_batch_size": True}
    assert not accepts_loss_kwargs(json.loads((base / "config.json").read_text()))
    theirs = run_trl(base, settings, ROWS, lora, processing_class=tokenizer())
    with room_for(1, base, tmp_path / "run", settings, lora):
        ours = run_mlx(base, settings, ROWS, lora, processing_class=tokenizer())
    assert assert_same_curve(theirs, ours, relative=RELATIVE, weights=WEIGHTS) >= 4 * 7
    assert abs(mean_drift(theirs, ours)) < DRIFT


@pytest.mark.parametrize(("room", "pieces"), sampled([(5, 1), (3, 2), (2, 4), (1, 5)], (5, 1), (2, 4)))
def test_pieces_are_found_from_the_estimate(room, pieces, llama, tmp_path, caplog):
    settings = {"auto_find_batch_size": True, "num_train_epochs": 1, "neftune_noise_alpha": 5.0}
    lora = {**LORA, "lora_dropout": 0.2}
    whole = run_mlx(llama, {**SETTINGS, **settings, "auto_find_batch_size": False}, EVEN, lora)
    with room_for(room, llama, tmp_path / "a", settings, lora, EVEN):
        trainer = make_trainer(llama, tmp_path / "b", settings, lora, EVEN)
        asked = limit_rows(trainer, 5)
        text = describe_run(trainer)
        trainer.train()
    assert max(asked) == math.ceil(5 / pieces)
    assert f"auto_find_batch_size: {pieces} piece(s) a micro-batch" in text
    assert ("no number changes" in caplog.text) is (pieces > 1)
    # Dropout and noise draw for a row what they draw for it in the whole.
    weights = {name: value for name, value in zip(whole.weights, read(trainer).weights.values(), strict=True)}
    compared = assert_same_curve(
        whole, Run(trainer.state.log_history, weights), relative=OWN_RELATIVE, weights=OWN_WEIGHTS
    )
    assert compared >= 2 * 7


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "all weights"])
@pytest.mark.parametrize("room", sampled([4, 1], 1))
def test_memory_that_runs_out_in_a_step_changes_no_number(room, lora, llama, tmp_path, caplog):
    settings = {"auto_find_batch_size": True, "learning_rate": 1e-4}
    whole = make_trainer(llama, tmp_path / "a", settings, lora, EVEN)
    whole.train()
    trainer = make_trainer(llama, tmp_path / "b", settings, lora, EVEN)
    asked = limit_rows(trainer, room)
    trainer.train()
    assert max(asked) == 5
    assert SAID in caplog.text
    assert_same_curve(read(whole), read(trainer), relative=OWN_RELATIVE, weights=OWN_WEIGHTS)
    assert trainer.state.global_step == 4


def test_a_run_resumed_on_a_smaller_device(llama, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "auto_find_batch_size": True}
    lora = {**LORA, "lora_dropout": 0.2}
    whole = make_trainer(llama, tmp_path, settings, lora, EVEN)
    whole.train()
    for room in (5, 2):
        resumed = make_trainer(llama, tmp_path, settings, lora, EVEN)
        limit_rows(resumed, room)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        a, b = ([e for e in run.state.log_history if "loss" in e] for run in (whole, resumed))
        assert [e["loss"] for e in b] == pytest.approx([e["loss"] for e in a], rel=OWN_RELATIVE)
        assert len(a) == 4


def test_a_run_of_trl_goes_on_with_the_batch_that_it_ended_with(llama, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "auto_find_batch_size": True, "max_steps": 4}
    with warnings.catch_warnings(action="ignore"):
        theirs = SFTTrainer(
            str(llama),
            SFTConfig(output_dir=str(tmp_path), **{**SILENT, **SETTINGS, **settings}),
            train_dataset=Dataset.from_list(ROWS),
            peft_config=LoraConfig(**LORA),
        )
        theirs._train_batch_size = 2  # as after two halvings
        theirs.train()
    checkpoint = str(tmp_path / "checkpoint-2")
    with pytest.raises(CheckpointError, match="per_device_train_batch_size=2"):
        make_trainer(llama, tmp_path, settings).train(resume_from_checkpoint=checkpoint)
    ours = make_trainer(llama, tmp_path, {**settings, "per_device_train_batch_size": 2})
    ours.train(resume_from_checkpoint=checkpoint)
    curves = [[e["loss"] for e in run.state.log_history if "loss" in e] for run in (theirs, ours)]
    assert curves[1] == pytest.approx(curves[0], rel=RELATIVE) and len(curves[0]) == 4


def test_without_it_the_error_says_what_to_write(llama, tmp_path):
    trainer = make_trainer(llama, tmp_path, {}, LORA, EVEN)
    before = read(trainer).weights
    limit_rows(trainer, 3)
    with pytest.raises(TrainingError, match="auto_find_batch_size=True") as caught:
        trainer.train()
    assert str(caught.value.__cause__) == SAID
    # What accelerate's decorators look for in any trainer's error.
    assert should_reduce_batch_size(caught.value)
    # The step left nothing behind.
    assert all(np.array_equal(value, read(trainer).weights[name]) for name, value in before.items())
    assert trainer.state.global_step == 0 and trainer.session.step.draws == 0


def test_a_row_that_does_not_fit_alone(llama, tmp_path):
    trainer = make_trainer(llama, tmp_path, {"auto_find_batch_size": True}, LORA, EVEN)
    asked = limit_rows(trainer, 0)
    with pytest.raises(
        TrainingError, match=r"(?s)1 row\(s\) x .*gradient_checkpointing=True, or max_length="
    ) as caught:
        trainer.train()
    assert str(caught.value.__cause__) == SAID
    assert set(asked) == {5, 3, 2, 1}


def test_evaluation_is_left_as_it_is(llama, tmp_path):
    settings = {"auto_find_batch_size": True, "eval_strategy": "epoch", "per_device_eval_batch_size": 4}
    trainer = make_trainer(llama, tmp_path, settings, LORA, EVEN, eval_dataset=Dataset.from_list(EVEN[:4]))
    objective = Limited(trainer.session.evaluator.objective, 2)
    objective.slots = trainer.session.evaluator.objective.slots
    trainer.session.evaluator.objective = objective
    with pytest.raises(TrainingError, match="per_device_eval_batch_size=2"):
        trainer.train()
    assert trainer.state.global_step == 2


def test_a_mixture_of_experts_stays_whole_where_its_load_is_balanced(tmp_path, caplog):
    make_model("mixtral", vocab_size=len(tokenizer())).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    lora = {**LORA, "target_modules": ["q_proj", "v_proj"]}
    curves = {}
    for coefficient, most in ((0.5, 5), (0.0, 1)):
        settings = {"auto_find_batch_size": True, "router_aux_loss_coef": coefficient, "num_train_epochs": 1}
        with room_for(1, tmp_path / "base", tmp_path / "a", settings, lora, EVEN):
            trainer = make_trainer(tmp_path / "base", tmp_path / "b", settings, lora, EVEN)
            asked = limit_rows(trainer, 5)
            trainer.train()
        curves[coefficient] = read(trainer)
        assert max(asked) == most
        assert ("micro-batches of this model are computed whole" in caplog.text) is (most == 5)
        caplog.clear()
    whole = make_trainer(tmp_path / "base", tmp_path / "c", {**settings, "auto_find_batch_size": False}, lora, EVEN)
    whole.train()
    assert_same_curve(read(whole), curves[0.0], relative=OWN_RELATIVE, weights=OWN_WEIGHTS)


def test_the_peak_is_in_the_result_where_memory_metrics_are_asked_for(llama, tmp_path):
    trainer = make_trainer(llama, tmp_path / "a", {"skip_memory_metrics": False})
    result = trainer.train()
    held = sum(value.nbytes for value in trainer.session.step.params.values())
    assert held < result.metrics["train_mem_gpu_peak"] < 2**30

    trainer = make_trainer(llama, tmp_path / "b", {})
    assert not any("mem" in key for key in trainer.train().metrics)
