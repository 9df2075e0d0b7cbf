"""Checkpoints of reward models beside TRL's: each goes on from the other's, and its files are the other's."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from huggingface_hub import ModelCard
from pairs import SILENT, tiny_model
from peft import AutoPeftModelForSequenceClassification, PeftModel
from reward_pairs import arguments, assert_same_entries, reward_rows
from safetensors.torch import load_file
from trl import RewardConfig, RewardTrainer

from hf_mlx import MLXRewardTrainer

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "SEQ_CLS"}
# 10 rows in micro-batches of 2, windows of 2: an epoch is 3 steps, the last of one micro-batch.
SETTINGS = {**SILENT, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 6,
            "learning_rate": 1e-3, "logging_steps": 1, "save_strategy": "steps", "save_steps": 2}  # fmt: skip
ROWS = reward_rows("text", 10)
WIDE = pytest.mark.wide
OWN = {"hf_mlx_manifest.json", "hf_mlx_state.json"}
IDS = [[5, 9, 30, 71, 100, 7], [40, 8, 21, 2, 2, 2]]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(autouse=True)
def quiet():
    # The functions are the same; compiled they are compared in test_reward_training.
    mx.disable_compile()
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    mx.enable_compile()
    logging.disable(logging.NOTSET)


def make(cls: type, model: Path, folder: Path, how: str, **settings: Any) -> Any:
    return cls(
        **arguments(model, how, dict(LORA)),
        args=RewardConfig(output_dir=str(folder), **{**SETTINGS, **settings}),
        train_dataset=Dataset.from_list(ROWS),
    )


def rewards(trainer: Any) -> np.ndarray:
    """Of the rows of :data:`IDS`, by our own model as it stands."""
    arrays = {"input_ids": mx.array(IDS), "last": mx.array([5, 2])}
    return np.array(trainer.session.step.objective.logits(arrays))


@pytest.mark.parametrize("how", ["name", "name, full", pytest.param("peft model", marks=WIDE)])
def test_each_goes_on_from_the_other(model, tmp_path, how):
    theirs = make(RewardTrainer, model, tmp_path / "RewardTrainer", how)
    theirs.train()
    make(MLXRewardTrainer, model, tmp_path / "MLXRewardTrainer", how).train()
    files, tensors = {}, []
    for name in ("RewardTrainer", "MLXRewardTrainer"):
        folder = tmp_path / name / "checkpoint-4"
        files[name] = {str(path.relative_to(folder)) for path in folder.rglob("*")}
        assert (tmp_path / name / "README.md").is_file()
        tensors.append(load_file(folder / ("model.safetensors" if "full" in how else "adapter_model.safetensors")))
    assert files["MLXRewardTrainer"] == files["RewardTrainer"] | OWN
    assert tensors[0].keys() == tensors[1].keys() and any(name.endswith("score.weight") for name in tensors[0])
    for name, value in tensors[0].items():
        torch.testing.assert_close(tensors[1][name], value, atol=2e-4, rtol=1e-3)
    whole = theirs.state.log_history
    for cls, other in ((RewardTrainer, "MLXRewardTrainer"), (MLXRewardTrainer, "RewardTrainer")):
        again = make(cls, model, tmp_path / f"again {cls.__name__}", how)
        again.train(resume_from_checkpoint=str(tmp_path / other / "checkpoint-4"))
        expected, went_on = (
            # Upstream's counter of tokens begins again where it resumes; here it goes on.
            [{**entry, "num_tokens": 0} for entry in log if "loss" in entry and entry["step"] > 4]
            for log in (whole, again.state.log_history)
        )
        assert len(went_on) == 2
        assert assert_same_entries(expected, went_on, relative=1e-4, loss=1e-5) >= 20


@pytest.mark.parametrize("how", ["name", pytest.param("object, full", marks=WIDE)])
def test_a_resumed_run_ends_bit_for_bit_as_one_that_was_not_stopped(model, tmp_path, how):
    whole = make(MLXRewardTrainer, model, tmp_path / "whole", how)
    whole.train()
    again = make(MLXRewardTrainer, model, tmp_path / "again", how)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    first, second = (trainer.session.step.params for trainer in (whole, again))
    assert first.keys() == second.keys() and len(first) > 8
    assert all(np.array_equal(np.array(value), np.array(second[name])) for name, value in first.items())


def test_the_adapter_scores_in_peft_as_here(model, tmp_path):
    trainer = make(MLXRewardTrainer, model, tmp_path, "name", max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loads = [
        lambda: PeftModel.from_pretrained(
            transformers.AutoModelForSequenceClassification.from_pretrained(model, num_labels=1), tmp_path / "saved"
        ),
        lambda: AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "saved", num_labels=1),
    ]
    for load in loads:
        loaded = load().eval()
        loaded.config.pad_token_id = 2
        with torch.no_grad():
            theirs = loaded(torch.tensor(IDS)).logits
        np.testing.assert_allclose(rewards(trainer), theirs.numpy(), atol=1e-6)
    assert "AutoModelForSequenceClassification.from_pretrained" in (tmp_path / "saved" / "README.md").read_text()


def test_the_adapters_config_is_pefts(model, tmp_path):
    configs = []
    for cls in (RewardTrainer, MLXRewardTrainer):
        made = make(cls, model, tmp_path / cls.__name__, "name", max_steps=1)
        made.save_model(str(tmp_path / cls.__name__ / "saved"))
        config = json.loads((tmp_path / cls.__name__ / "saved" / "adapter_config.json").read_text())
        configs.append({**config, "target_modules": sorted(config["target_modules"])})
    assert configs[0] == configs[1] and configs[1]["modules_to_save"] == ["classifier", "score"]


@pytest.mark.parametrize("how", ["name, full", pytest.param("object, full", marks=WIDE)])
def test_the_whole_model_scores_in_transformers_as_here(model, tmp_path, how):
    trainer = make(MLXRewardTrainer, model, tmp_path / "ours", how, max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        theirs = loaded(torch.tensor(IDS)).logits
    assert theirs.shape == (2, 1)
    np.testing.assert_allclose(rewards(trainer), theirs.numpy(), atol=1e-6)
    # And goes on being trained here, from its own score.
    again = MLXRewardTrainer(
        str(tmp_path / "saved"),
        RewardConfig(str(tmp_path / "again"), **SETTINGS),
        train_dataset=Dataset.from_list(ROWS),
    )
    np.testing.assert_array_equal(rewards(again), rewards(trainer))


def test_the_whole_models_config_is_transformers(model, tmp_path):
    configs = []
    for cls in (RewardTrainer, MLXRewardTrainer):
        made = make(cls, model, tmp_path / cls.__name__, "name, full", max_steps=1, save_strategy="no")
        made.train()
        made.save_model(str(tmp_path / cls.__name__ / "saved"))
        configs.append(json.loads((tmp_path / cls.__name__ / "saved" / "config.json").read_text()))
    theirs, ours = configs
    assert {key: (value, ours.get(key)) for key, value in theirs.items() if ours.get(key) != value} == {}


def test_the_model_card_says_what_trls_says(model, tmp_path):
    cards = []
    for cls in (RewardTrainer, MLXRewardTrainer):
        make(cls, model, tmp_path / cls.__name__ / "run", "name", max_steps=2).train()
        cards.append(ModelCard.load(tmp_path / cls.__name__ / "run" / "README.md"))
    theirs, ours = (card.data.to_dict() for card in cards)
    assert set(theirs["tags"]) <= set(ours["tags"])
    # Of an adapter TRL's card says "transformers", which does not load it alone.
    assert ours["model_name"] == theirs["model_name"] and ours["library_name"] == "peft"
    assert "AutoModelForSequenceClassification" in cards[1].text and "text-generation" not in cards[1].text
