"""Documents that share a row are kept apart here, whatever masks of transformers know of them; a difference is said."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from pairs import run_both, tiny_model
from peft import LoraConfig
from trl import SFTConfig

from hf_mlx import MLXSFTTrainer

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
SETTINGS: dict[str, Any] = {"max_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1}
LORA: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family, mixed", [("gpt_oss", True), ("llama", False)])
def test_packed_documents_have_the_loss_of_single_ones(family, mixed, tmp_path, caplog):
    model = tiny_model(family, tmp_path, max_position_embeddings=256, **SIZES)
    draw = np.random.default_rng(3)
    rows = Dataset.from_dict({"input_ids": [draw.integers(5, 300, n).tolist() for n in (30, 25, 20, 21)]})
    losses = {}
    for packing in (False, True):
        settings = {**SETTINGS, "packing": packing, "max_length": 96}
        losses[packing] = [run.history[0]["loss"] for run in run_both(model, settings, rows, LORA)]
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            args = SFTConfig(str(tmp_path / "out"), use_cpu=True, report_to="none", **settings)
            MLXSFTTrainer(str(model), args=args, train_dataset=rows, peft_config=LoraConfig(**LORA))
        said = [record.message for record in caplog.records if "see each other" in record.message]
        assert len(said) == (packing and mixed)

    (alone, ours_alone), (packed, ours_packed) = losses[False], losses[True]
    assert ours_alone == pytest.approx(alone, rel=1e-6)
    # A packed row's first tokens are no targets, as those of single rows are not.
    assert ours_packed == pytest.approx(alone, rel=1e-6)
    assert (abs(packed - alone) > 1e-5 * alone) == mixed
