"""Memory: the estimate against MLX's own peak, checkpointing that saves without changing the curve, and donation."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pairs
import pytest
from datasets import Dataset
from memory_checks import peak_of_a_step
from peft import LoraConfig
from sampling import sampled
from training_checks import EXCLUDED, make_base
from trl import SFTConfig

from hf_mlx import MLXSFTTrainer
from hf_mlx.surface.estimate import estimate_memory

LORA = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
ROWS, TOKENS, STEPS = 4, 256, 3
# The estimate counts what autograd keeps, not the order in which MLX frees temporaries.
FACTOR = 1.5


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 8}
    return pairs.tiny_model("llama", tmp_path_factory.mktemp("model"), **sizes)


def make_trainer(model, folder, *, lora=LORA, rows=ROWS, tokens=TOKENS, **settings):
    ids = np.random.default_rng(0).integers(5, 300, (rows * STEPS, tokens)).tolist()
    args = SFTConfig(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=rows,
        logging_steps=1,
        max_length=None,
        **{**pairs.SILENT, "gradient_checkpointing": False, **settings},
    )
    return MLXSFTTrainer(str(model), args, train_dataset=Dataset.from_dict({"input_ids": ids}), peft_config=lora)


@pytest.mark.parametrize(
    ("lora", "rows", "tokens", "checkpointing"),
    sampled(
        [
            (lora, *shape, kept)
            for lora, *shape in ((LORA, 4, 256), (None, 4, 256), (LORA, 1, 1536))
            for kept in (False, True)
        ],
        (None, 4, 256, False),
        (None, 4, 256, True),
        (LORA, 1, 1536, True),
    ),
)
def test_the_estimate_is_near_the_peak(model, tmp_path, lora, rows, tokens, checkpointing):
    trainer = make_trainer(model, tmp_path, lora=lora, rows=rows, tokens=tokens, gradient_checkpointing=checkpointing)
    measured, estimated = peak_of_a_step(trainer), estimate_memory(trainer).total

    assert measured / FACTOR <= estimated <= measured * FACTOR, f"{measured / 2**20:.1f} {estimated / 2**20:.1f} MiB"


# States of recurrent layers and what their backward pass holds at once.
RECURRENT = sampled(["qwen3_5_text", "mamba2", "mamba", "kimi_linear"], "qwen3_5_text")


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("model_type", RECURRENT)
def test_the_estimate_counts_recurrent_states(model_type, checkpointing, tmp_path):
    base = make_base(model_type, tmp_path / "base", max_position_embeddings=512)
    lora = LoraConfig(r=8, target_modules="all-linear", exclude_modules=EXCLUDED.get(model_type))
    settings = {"gradient_checkpointing": checkpointing, "router_aux_loss_coef": 0.0}
    trainer = make_trainer(base, tmp_path, lora=lora, **settings)
    measured, estimated = peak_of_a_step(trainer), estimate_memory(trainer).total

    assert measured / FACTOR <= estimated <= measured * FACTOR, f"{measured / 2**20:.1f} {estimated / 2**20:.1f} MiB"


def test_checkpointing_saves_and_changes_no_number(model, tmp_path):
    kept = make_trainer(model, tmp_path / "a")
    recomputed = make_trainer(model, tmp_path / "b", gradient_checkpointing=True)
    curves = []
    for trainer in (kept, recomputed):
        trainer.train()
        curves.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])

    assert len(curves[0]) == STEPS
    # fp32: the same operations, fused otherwise by the compiler.
    assert curves[1] == pytest.approx(curves[0], rel=1e-6)
    # Eight blocks: one is alive at a time, and the inputs of all.
    assert peak_of_a_step(recomputed) < 0.6 * peak_of_a_step(kept)


def test_no_step_leaves_memory_behind(model, tmp_path):
    trainer = make_trainer(model, tmp_path, lora=None)
    step = trainer.session.step
    window = [trainer.data.inputs(next(iter(trainer.data.train_loader(trainer.train_dataset))))]
    trainer.session.loaded.model.train()
    active = []
    for number in range(1, 5):
        step(window, number, 1e-4)
        mx.eval(step.params, step.state)
        mx.synchronize()
        active.append(mx.get_active_memory())

    # Old parameters, states and gradients are gone; a few scalars of the last step are not.
    assert max(active[1:]) - min(active[1:]) < 2**16
