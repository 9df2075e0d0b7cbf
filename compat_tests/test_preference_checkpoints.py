"""Checkpoints of preference training beside TRL's: each goes on from the other's, and its files are the other's."""

from __future__ import annotations

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
from peft import PeftModel
from preference_pairs import arguments, assert_same_entries
from safetensors.torch import load_file
from trl import DPOConfig, DPOTrainer

from hf_mlx import MLXDPOTrainer

ADAPTER = {**LORA, "task_type": "CAUSAL_LM"}
WIDE = pytest.mark.wide


def make(cls: type, model: Path, folder: Path, reference: str, **settings: Any) -> Any:
    settings = {**SETTINGS, "precompute_ref_log_probs": "precomputed" in reference, **settings}
    return cls(
        **arguments(model, reference, dict(ADAPTER)),
        args=DPOConfig(output_dir=str(folder), **settings),
        train_dataset=ROWS,
    )


@pytest.mark.parametrize(
    "reference", [pytest.param("adapter off", marks=WIDE), "peft model", pytest.param("full", marks=WIDE)]
)
def test_each_goes_on_from_the_other(model, tmp_path, reference):
    theirs = make(DPOTrainer, model, tmp_path / "DPOTrainer", reference)
    theirs.train()
    make(MLXDPOTrainer, model, tmp_path / "MLXDPOTrainer", reference).train()
    outputs = [tmp_path / name for name in ("DPOTrainer", "MLXDPOTrainer")]
    files = assert_same_files(*outputs)
    assert ("ref/adapter_model.safetensors" in files) == (reference == "peft model")
    if reference == "peft model":
        kept = [load_file(output / "checkpoint-4" / "ref" / "adapter_model.safetensors") for output in outputs]
        assert kept[0].keys() == kept[1].keys()
        assert all(torch.equal(value, kept[1][key]) for key, value in kept[0].items())
    whole = theirs.state.log_history
    for cls, other in ((DPOTrainer, "MLXDPOTrainer"), (MLXDPOTrainer, "DPOTrainer")):
        again = make(cls, model, tmp_path / f"again {cls.__name__}", reference)
        again.train(resume_from_checkpoint=str(tmp_path / other / "checkpoint-4"))
        # Upstream's counter of tokens begins again where it resumes; here it goes on.
        left_out = ("num_tokens",) if cls is DPOTrainer else ()
        expected, went_on = (entries_after(log) for log in (whole, again.state.log_history))
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
    assert_same_arrays(whole, again)


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
    for cls in (DPOTrainer, MLXDPOTrainer):
        make(cls, model, tmp_path / cls.__name__ / "run", "adapter off", max_steps=2).train()
    cards = assert_cards_agree(*(tmp_path / name / "run" for name in ("DPOTrainer", "MLXDPOTrainer")))
    said = "[Direct Preference Optimization: Your Language Model is Secretly a Reward Model]"
    for text in (said, "papers/2305.18290", "rafailov2023direct"):
        assert all(text in card for card in cards)
