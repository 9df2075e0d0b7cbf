"""Memory of preference training: the estimate, reference included, against MLX's own peak."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset
from memory_checks import peak_of_a_step
from pairs import SILENT, tiny_model
from preference_pairs import arguments
from trl import DPOConfig

from hf_mlx import MLXDPOTrainer
from hf_mlx.surface.estimate import describe_run, estimate_memory

LORA = {"r": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
PAIRS, TOKENS = 2, 192
# The estimate counts what autograd keeps, not the order in which MLX frees temporaries.
FACTOR = 1.5


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6}
    return tiny_model("llama", tmp_path_factory.mktemp("model"), **sizes)


@pytest.mark.parametrize(("reference", "checkpointing"), [("other model, full", True)])
def test_the_estimate_is_near_the_peak(model, tmp_path, reference, checkpointing):
    check(model, tmp_path, reference, checkpointing)


@pytest.mark.wide
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("reference", ["adapter off", "full", "other model, full", "precomputed"])
def test_all_estimates(model, tmp_path, reference, checkpointing):
    check(model, tmp_path, reference, checkpointing)


def check(model, tmp_path, reference, checkpointing):
    texts = [" ".join(["the model"] * TOKENS) for _ in range(2)]
    rows = [{"prompt": "it", "chosen": f"{texts[0]} {i}", "rejected": f"{texts[1]} not {i}"} for i in range(2 * PAIRS)]
    settings = {**SILENT, "per_device_train_batch_size": PAIRS, "max_steps": 2, "max_length": TOKENS}
    trainer = MLXDPOTrainer(
        **arguments(model, reference, LORA),
        args=DPOConfig(str(tmp_path), gradient_checkpointing=checkpointing,
                       precompute_ref_log_probs="precomputed" in reference, **settings),
        train_dataset=Dataset.from_list(rows),
    )  # fmt: skip
    own, window = estimate_memory(trainer), next(iter(trainer.data.train_loader(trainer.train_dataset)))
    assert trainer.data.inputs(window).arrays["input_ids"].shape == (2 * PAIRS, TOKENS)
    measured = peak_of_a_step(trainer)
    assert measured / FACTOR <= own.total <= measured * FACTOR
    assert (own.reference > 0) == ("full" in reference)
    if own.reference:
        assert own.reference == pytest.approx(own.gradients, rel=0.01)
    assert np.isfinite(own.total) and "peak memory, estimated" in describe_run(trainer)
