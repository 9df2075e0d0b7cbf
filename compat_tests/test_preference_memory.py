"""Memory of preference training: the estimate, reference included, against MLX's own peak."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from datasets import Dataset
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
    step, own = trainer.session.step, estimate_memory(trainer)
    window = [trainer.data.inputs(next(iter(trainer.data.train_loader(trainer.train_dataset))))]
    assert window[0].arrays["input_ids"].shape == (2 * PAIRS, TOKENS)
    trainer.session.loaded.model.train()
    for number in (1, 2):
        mx.clear_cache()
        mx.synchronize()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        step(window, number, 1e-4)
        mx.eval(step.params, step.state)
    # What other tests of this process still hold is not this trainer's.
    measured = mx.get_peak_memory() - before + own.weights + own.reference + own.optimizer
    assert measured / FACTOR <= own.total <= measured * FACTOR
    assert (own.reference > 0) == ("full" in reference)
    if own.reference:
        assert own.reference == pytest.approx(own.gradients, rel=0.01)
    assert np.isfinite(own.total) and "peak memory, estimated" in describe_run(trainer)
