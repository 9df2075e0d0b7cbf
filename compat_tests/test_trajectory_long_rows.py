"""Rows of more than a thousand tokens, whose attention is computed a block of queries at a time: TRL's curve still."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset
from pairs import assert_same_curve, run_both, tiny_model
from sampling import sampled

pytestmark = pytest.mark.filterwarnings("ignore")

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
LORA = {"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
SETTINGS = {
    "per_device_train_batch_size": 2,
    "max_steps": 2,
    "learning_rate": 1e-2,
    "max_length": None,
    "logging_steps": 1,
}

WINDOWS = {"head_dim": 8, "sliding_window": 100}

# family, options of the model, settings, adapter
CASES = {
    "padded": ("llama", {}, {}, LORA),
    "packed": ("llama", {}, {"packing": True, "max_length": 1300}, LORA),
    "recomputed, all weights": ("llama", {}, {"gradient_checkpointing": True}, None),
    "windows": ("gemma3_text", WINDOWS, {}, LORA),
    "windows, packed": ("gemma3_text", WINDOWS, {"packing": True, "max_length": 1300}, LORA),
    "windows, recomputed, all weights": ("gemma3_text", WINDOWS, {"gradient_checkpointing": True}, None),
    "windows and sinks": ("gpt_oss", {"head_dim": 8, "sliding_window": 130}, {}, LORA),
    "windows of Mistral": ("mistral", {"sliding_window": 200}, {}, LORA),
    "windows, evaluated": ("gemma3_text", WINDOWS, {"eval_strategy": "steps", "eval_steps": 1}, LORA),
}


@pytest.mark.parametrize("case", sampled(CASES, "packed", "windows, packed"))
def test_long_rows_keep_the_curve(case, tmp_path):
    family, options, settings, lora = CASES[case]
    model = tiny_model(family, tmp_path, max_position_embeddings=2048, **SIZES, **options)
    draw = np.random.default_rng(3)
    rows = Dataset.from_dict({"input_ids": [draw.integers(5, 300, n).tolist() for n in (1290, 1100, 1025, 300)]})
    evaluated = {"eval_dataset": rows} if "eval_strategy" in settings else {}

    theirs, ours = run_both(model, {**SETTINGS, **settings}, rows, lora, **evaluated)

    assert assert_same_curve(theirs, ours, relative=1e-4, weights=1e-3) > 10
