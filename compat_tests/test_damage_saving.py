"""Trainers that are killed while saving, and two of them in one output_dir."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import warnings
from pathlib import Path

import pytest
from checkpoint_runs import LORA, PRELOAD, SETTINGS, make_rows, make_trainer
from datasets import Dataset
from pairs import tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import SFTConfig

from hf_mlx import MLXSFTTrainer
from hf_mlx.errors import CheckpointError

KINDS = [
    "adapter",
    "torch model",
    pytest.param("whole model", marks=pytest.mark.wide),
    pytest.param("PeftModel", marks=pytest.mark.wide),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def trainer_of(kind: str, model: Path, out: Path):
    if kind in ("adapter", "whole model"):
        return make_trainer(model, out, rows=6, lora=kind == "adapter", max_steps=1, save_strategy="no")
    base = AutoModelForCausalLM.from_pretrained(model)
    args = SFTConfig(output_dir=str(out), **{**SETTINGS, "max_steps": 1, "save_strategy": "no", "eval_strategy": "no"})
    trained = get_peft_model(base, LoraConfig(**LORA)) if kind == "PeftModel" else base
    return MLXSFTTrainer(trained, args, train_dataset=Dataset.from_list(make_rows(6)))


def save_and_die(kind: str, model: str, out: str, moment: int) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    logging.disable(logging.CRITICAL)
    trainer = trainer_of(kind, Path(model), Path(out))
    left = [moment]

    def hook(event: str, arguments: tuple) -> None:
        if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir") and out in str(arguments[0]):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    trainer.save_model(str(Path(out, "saved")))


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_save_leaves_nothing_that_looks_whole(model, tmp_path, kind):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    killed = 0
    for moment in (4, 9, 14):
        process = context.Process(target=save_and_die, args=(kind, str(model), str(tmp_path), moment))
        process.start()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        assert process.exitcode in (0, -signal.SIGKILL)
        saved = tmp_path / "saved"
        if [*saved.glob("*.safetensors")]:
            assert {"tokenizer.json", "training_args.bin"} <= {path.name for path in saved.iterdir()}
    assert killed >= 2
    trainer = trainer_of(kind, model, tmp_path)
    trainer.save_model(str(tmp_path / "saved"))
    assert [path.name for path in tmp_path.rglob(".*")] == []
    if kind in ("adapter", "PeftModel"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), str(tmp_path / "saved"))
    else:
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


def test_a_second_run_in_one_output_dir_is_told_and_harms_nothing(model, tmp_path):
    second = make_trainer(model, tmp_path, rows=6, max_steps=2, save_steps=1)
    refused = []

    class Start(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            with pytest.raises(CheckpointError, match=f"process {os.getpid()} on") as told:
                second.train(resume_from_checkpoint=True if state.global_step > 1 else None)
            refused.append(str(told.value))

    first = make_trainer(model, tmp_path, rows=6, max_steps=2, save_steps=1, callbacks=[Start()])
    first.train()
    assert len(refused) == 2 and first.state.global_step == 2
    # Once the first has ended, the folder is free.
    second.train(resume_from_checkpoint=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md", "checkpoint-1", "checkpoint-2", "report.html"
    ]  # fmt: skip
