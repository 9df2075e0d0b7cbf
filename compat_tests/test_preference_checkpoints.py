"""Checkpoints of preference training beside TRL's: each goes on from the other's, and its files are the other's."""

from __future__ import annotations

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
from peft import PeftModel
from preference_pairs import arguments, assert_same_entries, preference_rows
from safetensors.torch import load_file
from trl import DPOConfig, DPOTrainer

from hf_mlx import MLXDPOTrainer

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
# 10 rows in micro-batches of 2, windows of 2: an epoch is 3 steps, the last of one micro-batch.
SETTINGS = {**SILENT, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 6,
            "learning_rate": 1e-3, "logging_steps": 1, "save_strategy": "steps", "save_steps": 2}  # fmt: skip
ROWS = preference_rows("text", 10)
WIDE = pytest.mark.wide
OWN = {"hf_mlx_manifest.json", "hf_mlx_state.json"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(autouse=True)
def quiet():
    # The functions are the same; compiled they are compared in test_preference_training.
    mx.disable_compile()
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    mx.enable_compile()
    logging.disable(logging.NOTSET)


def make(cls: type, model: Path, folder: Path, reference: str, **settings: Any) -> Any:
    settings = {**SETTINGS, "precompute_ref_log_probs": "precomputed" in reference, **settings}
    return cls(
        **arguments(model, reference, dict(LORA)),
        args=DPOConfig(output_dir=str(folder), **settings),
        train_dataset=Dataset.from_list(ROWS),
    )


@pytest.mark.parametrize(
    "reference", [pytest.param("adapter off", marks=WIDE), "peft model", pytest.param("full", marks=WIDE)]
)
def test_each_goes_on_from_the_other(model, tmp_path, reference):
    theirs = make(DPOTrainer, model, tmp_path / "DPOTrainer", reference)
    theirs.train()
    make(MLXDPOTrainer, model, tmp_path / "MLXDPOTrainer", reference).train()
    files = {}
    for name in ("DPOTrainer", "MLXDPOTrainer"):
        folder = tmp_path / name / "checkpoint-4"
        files[name] = {str(path.relative_to(folder)) for path in folder.rglob("*")}
        assert (tmp_path / name / "README.md").is_file()
    assert files["MLXDPOTrainer"] == files["DPOTrainer"] | OWN
    assert ("ref/adapter_model.safetensors" in files["DPOTrainer"]) == (reference == "peft model")
    if reference == "peft model":
        kept = [load_file(tmp_path / name / "checkpoint-4" / "ref" / "adapter_model.safetensors") for name in files]
        assert kept[0].keys() == kept[1].keys()
        assert all(torch.equal(value, kept[1][key]) for key, value in kept[0].items())
    whole = theirs.state.log_history
    for cls, other in ((DPOTrainer, "MLXDPOTrainer"), (MLXDPOTrainer, "DPOTrainer")):
        again = make(cls, model, tmp_path / f"again {cls.__name__}", reference)
        again.train(resume_from_checkpoint=str(tmp_path / other / "checkpoint-4"))
        # Upstream's counter of tokens begins again where it resumes; here it goes on.
        left_out = ("num_tokens",) if cls is DPOTrainer else ()
        expected, went_on = (
            [entry for entry in log if "loss" in entry and entry["step"] > 4]
            for log in (whole, again.state.log_history)
        )
        assert len(went_on) == 2
        assert assert_same_entries(expected, went_on, relative=1e-4, left_out=left_out) >= 30


@pytest.mark.parametrize(
    "reference", [pytest.param("adapter off", marks=WIDE), "full", pytest.param("precomputed", marks=WIDE)]
)
def test_a_resumed_run_ends_bit_for_bit_as_one_that_was_not_stopped(model, tmp_path, reference):
    moving = {"sync_ref_model": True, "ref_model_sync_steps": 1} if reference == "full" else {}
    whole = make(MLXDPOTrainer, model, tmp_path / "whole", reference, **moving)
    whole.train()
    again = make(MLXDPOTrainer, model, tmp_path / "again", reference, **moving)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    first, second = (trainer.session.step.params for trainer in (whole, again))
    assert first.keys() == second.keys()
    assert all(np.array_equal(np.array(value), np.array(second[name])) for name, value in first.items())


def test_the_adapter_answers_in_peft_as_here(model, tmp_path):
    trainer = make(MLXDPOTrainer, model, tmp_path, "adapter off", max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "saved")).eval()
    ids = torch.tensor([[5, 9, 30, 71, 100, 7]])
    with torch.no_grad():
        theirs, plain = loaded(ids).logits, loaded.get_base_model()(ids).logits
        with loaded.disable_adapter():
            assert not torch.allclose(loaded(ids).logits, theirs, atol=1e-4)
    ours = np.array(trainer.session.step.objective.logits({"input_ids": mx.array(ids.numpy())}))
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5)
    assert plain.shape == theirs.shape


def test_the_model_card_says_what_trls_says(model, tmp_path):
    cards = []
    for cls in (DPOTrainer, MLXDPOTrainer):
        make(cls, model, tmp_path / cls.__name__ / "run", "adapter off", max_steps=2).train()
        cards.append(ModelCard.load(tmp_path / cls.__name__ / "run" / "README.md"))
    theirs, ours = (card.data.to_dict() for card in cards)
    assert set(theirs["tags"]) <= set(ours["tags"])
    # Of an adapter TRL's card says "transformers", which does not load it alone.
    assert ours["model_name"] == theirs["model_name"] and ours["library_name"] == "peft"
    said = "[Direct Preference Optimization: Your Language Model is Secretly a Reward Model]"
    for text in (said, "papers/2305.18290", "rafailov2023direct"):
        assert all(text in card.text for card in cards)
