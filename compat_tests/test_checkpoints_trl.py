"""Checkpoints beside TRL's: ten steps on one side and ten on the other are twenty steps in TRL."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_runs import LORA, SETTINGS, make_rows, make_trainer
from datasets import Dataset
from pairs import tiny_model
from peft import LoraConfig
from sampling import sampled
from trl import SFTConfig, SFTTrainer

# fp32 rounding, amplified by Adam's division over ten steps; measured 3e-6 relative.
RELATIVE = 1e-4
RUN = {"neftune_noise_alpha": None, "max_steps": 20, "save_steps": 10, "eval_strategy": "no", "logging_steps": 1}
# Written here alone, beside TRL's own files.
OWN = {"hf_mlx_manifest.json", "hf_mlx_state.json"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


@pytest.fixture(autouse=True)
def no_dropout(monkeypatch):
    # torch's masks cannot be drawn here, so the two sides are compared without.
    monkeypatch.setitem(LORA, "lora_dropout", 0.0)


def trl(model: Path, output_dir: Path, *, lora: bool = True, **settings: Any) -> SFTTrainer:
    config = SFTConfig(output_dir=str(output_dir), **{**SETTINGS, **RUN, **settings})
    data, peft = Dataset.from_list(make_rows()), LoraConfig(**LORA) if lora else None
    return SFTTrainer(str(model), config, train_dataset=data, eval_dataset=data.select(range(6)), peft_config=peft)


def mlx(model: Path, output_dir: Path, **settings: Any) -> Any:
    return make_trainer(model, output_dir, **{**RUN, **settings})


def weights(trainer: Any) -> dict[str, np.ndarray]:
    if isinstance(trainer, SFTTrainer):
        named = trainer.model.named_parameters()
        return {n.replace(".default", ""): p.detach().float().numpy() for n, p in named if p.requires_grad}
    session = trainer.session
    return {session.hf_name(name): np.array(value) for name, value in session.step.params.items()}


def assert_same_end(theirs: SFTTrainer, ours: Any, after: int) -> None:
    a, b = weights(theirs), weights(ours)
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert np.abs(value - b[name]).max() <= RELATIVE * np.abs(value).max(), name
    logged = [[e for e in t.state.log_history if "loss" in e and e["step"] > after] for t in (theirs, ours)]
    assert len(logged[0]) == len(logged[1]) == 20 - after
    for x, y in zip(*logged, strict=True):
        for key in ("loss", "grad_norm", "learning_rate", "entropy"):
            assert y[key] == pytest.approx(x[key], rel=RELATIVE), (x["step"], key)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_ten_steps_on_each_side_are_twenty_in_trl(model, tmp_path, lora):
    whole = trl(model, tmp_path / "whole", lora=lora)
    whole.train()
    begun = mlx(model, tmp_path / "begun", lora=lora)
    begun.train()
    there = trl(model, tmp_path / "there", lora=lora)
    there.train(resume_from_checkpoint=str(tmp_path / "begun" / "checkpoint-10"))
    assert_same_end(whole, there, after=10)
    here = mlx(model, tmp_path / "here", lora=lora)
    here.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-10"))
    assert_same_end(whole, here, after=10)
    # Upstream's counter restarts at 0 when it resumes; here it goes on.
    assert here.state.log_history[-2]["num_tokens"] == whole.state.log_history[-2]["num_tokens"]


def _tree(value: Any) -> Any:
    """The shape of a state: keys, types, tensor shapes and dtypes, without the numbers in tensors."""
    if isinstance(value, torch.Tensor):
        return ("tensor", value.dtype, tuple(value.shape))
    if isinstance(value, dict):
        return {key: _tree(item) for key, item in value.items()}
    return [_tree(item) for item in value] if isinstance(value, list) else value


OPTIMIZERS: list[dict[str, Any]] = [
    {},
    {"optim": "adamw_torch", "lr_scheduler_type": "constant", "warmup_steps": 0},
    {"optim": "adafactor"},
    {"optim": "sgd", "optim_args": "momentum=0.9"},
    {"optim": "sgd"},
    {"optim": "rmsprop", "optim_args": "momentum=0.9,centered=true"},
    {"optim": "adagrad"},
    {
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "warmup_steps": 0,
        "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5, "threshold": 0.9},
        "metric_for_best_model": "eval_loss",
        "eval_strategy": "steps",
        "eval_steps": 5,
    },
]


FILES = [(settings, lora) for settings in OPTIMIZERS for lora in (True, False)]
# States of each shape: two moments, factored, one, centred, and a schedule by metric.
FEW = [(OPTIMIZERS[i], lora) for i, lora in ((0, True), (2, False), (3, True), (5, False), (7, True))]


def _name(value: Any) -> str:
    if isinstance(value, bool):
        return "lora" if value else "full"
    return "-".join(map(str, value.values()))[:40] or "default"


@pytest.mark.parametrize(("settings", "lora"), sampled(FILES, *FEW), ids=_name)
def test_the_files_are_those_of_trl(model, tmp_path, settings, lora):
    folders = {}
    for side, make in {"trl": trl, "mlx": mlx}.items():
        make(model, tmp_path / side, lora=lora, max_steps=10, **settings).train()
        folders[side] = tmp_path / side / "checkpoint-10"
    names = {side: {path.name for path in folder.iterdir()} for side, folder in folders.items()}
    assert names["mlx"] == names["trl"] | OWN
    for name in ("optimizer.pt", "scheduler.pt"):
        theirs, ours = (torch.load(folders[side] / name, weights_only=True) for side in ("trl", "mlx"))
        if name == "scheduler.pt" and "best" in theirs:
            assert ours.pop("best") == pytest.approx(theirs.pop("best"), rel=RELATIVE)
        assert _tree(ours) == _tree(theirs)
    theirs, ours = (json.loads((folders[side] / "trainer_state.json").read_text()) for side in ("trl", "mlx"))
    assert ours.keys() == theirs.keys()
    told = {"log_history", "best_metric", "best_model_checkpoint"}
    assert {k: v for k, v in ours.items() if k not in told} == {k: v for k, v in theirs.items() if k not in told}


def test_the_random_states_are_of_the_types_that_transformers_loads(model, tmp_path):
    from transformers.trainer_pt_utils import safe_globals

    mlx(model, tmp_path, max_steps=10).train()
    with safe_globals():
        state = torch.load(tmp_path / "checkpoint-10" / "rng_state.pth", weights_only=True)
    torch.Generator().set_state(state["cpu"])
    np.random.RandomState().set_state(state["numpy"])
    assert state.keys() == {"python", "numpy", "cpu"}


def test_the_arguments_are_pickled_as_transformers_does(model, tmp_path):
    mlx(model, tmp_path, max_steps=10).train()
    arguments = torch.load(tmp_path / "checkpoint-10" / "training_args.bin", weights_only=False)
    assert isinstance(arguments, SFTConfig)
    assert arguments.learning_rate == SETTINGS["learning_rate"]
