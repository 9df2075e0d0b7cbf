"""Checkpoints of reward models beside TRL's: each goes on from the other's, and its files are the other's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
import transformers
from pair_checkpoints import (
    LORA,
    ROWS,
    SETTINGS,
    assert_cards_agree,
    assert_same_arrays,
    assert_same_files,
    entries_after,
)
from pair_checkpoints import model as model
from pair_checkpoints import quiet as quiet
from peft import AutoPeftModelForSequenceClassification, PeftModel
from reward_pairs import arguments, assert_same_entries
from safetensors.torch import load_file
from trl import RewardConfig, RewardTrainer

from hf_mlx import MLXRewardTrainer

ADAPTER = {**LORA, "task_type": "SEQ_CLS"}
WIDE = pytest.mark.wide
IDS = [[5, 9, 30, 71, 100, 7], [40, 8, 21, 2, 2, 2]]


def make(cls: type, model: Path, folder: Path, how: str, **settings: Any) -> Any:
    return cls(
        **arguments(model, how, dict(ADAPTER)),
        args=RewardConfig(output_dir=str(folder), **{**SETTINGS, **settings}),
        train_dataset=ROWS,
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
    outputs = [tmp_path / name for name in ("RewardTrainer", "MLXRewardTrainer")]
    assert_same_files(*outputs)
    name = "model.safetensors" if "full" in how else "adapter_model.safetensors"
    tensors = [load_file(output / "checkpoint-4" / name) for output in outputs]
    assert tensors[0].keys() == tensors[1].keys() and any(name.endswith("score.weight") for name in tensors[0])
    for name, value in tensors[0].items():
        torch.testing.assert_close(tensors[1][name], value, atol=2e-4, rtol=1e-3)
    whole = theirs.state.log_history
    for cls, other in ((RewardTrainer, "MLXRewardTrainer"), (MLXRewardTrainer, "RewardTrainer")):
        again = make(cls, model, tmp_path / f"again {cls.__name__}", how)
        again.train(resume_from_checkpoint=str(tmp_path / other / "checkpoint-4"))
        # Upstream's counter of tokens begins again where it resumes; here it goes on.
        expected, went_on = (
            [{**entry, "num_tokens": 0} for entry in entries_after(log)] for log in (whole, again.state.log_history)
        )
        assert assert_same_entries(expected, went_on, relative=1e-4, loss=1e-5) >= 20


@pytest.mark.parametrize("how", ["name", pytest.param("object, full", marks=WIDE)])
def test_a_resumed_run_ends_bit_for_bit_as_one_that_was_not_stopped(model, tmp_path, how):
    whole = make(MLXRewardTrainer, model, tmp_path / "whole", how)
    whole.train()
    again = make(MLXRewardTrainer, model, tmp_path / "again", how)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert_same_arrays(whole, again)


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
        train_dataset=ROWS,
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
    for cls in (RewardTrainer, MLXRewardTrainer):
        make(cls, model, tmp_path / cls.__name__ / "run", "name", max_steps=2).train()
    card = assert_cards_agree(*(tmp_path / name / "run" for name in ("RewardTrainer", "MLXRewardTrainer")))[1]
    assert "AutoModelForSequenceClassification" in card and "text-generation" not in card
