"""Settings that change how a run computes and not what it computes: the curves are one curve."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from pairs import Run, rows_of, run_mlx, tiny_model
from sampling import sampled

import hf_mlx.feed
from hf_mlx.data.fitting import fit_shapes
from hf_mlx.data.shapes import Shapes

# The same fp32 sums in another order: measured up to 6e-7 of the value, and nothing at all where no order changes
# (checkpointed, eager). A wrong mask or denominator is 1e-2.
RELATIVE = 3e-6
# Adam divides a gradient by its own size, so rounding near zero shows in single weights: measured 1e-6, of lr = 1e-3.
WEIGHTS = 1e-5
# A wrong denominator moves every step the same way; rounding does not: measured 7e-8.
DRIFT = 5e-7

# `epoch` counts micro-batches, and entropy and accuracy are means of micro-batch means, as upstream logs them.
COMPARED = ("loss", "grad_norm", "learning_rate", "num_tokens", "train_loss", "eval_loss")

SETTINGS = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 4,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "weight_decay": 0.01,
    "max_grad_norm": 0.5,
    "logging_steps": 1,
    "gradient_checkpointing": False,
    "max_length": 128,
}
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
# 21 rows: 8, 8 and 5 a step, so the last window of an epoch is a partial one however it is cut.
ROWS = rows_of("prompt", 21)
STEPS = 4 * 3


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def reference(llama):
    return run_mlx(llama, SETTINGS, ROWS, LORA)


def assert_one_curve(a: Run, b: Run, *, steps: int) -> None:
    """Assert that two runs log the same values and end with the same weights."""
    assert len(a.history) == len(b.history)
    pairs = [(x, y, key) for x, y in zip(a.history, b.history, strict=True) for key in COMPARED if key in x]
    assert sum(key == "loss" for _, _, key in pairs) == steps
    for x, y, key in pairs:
        assert y[key] == pytest.approx(x[key], rel=RELATIVE), f"step {x['step']}: {key}"
    drift = np.mean([y[key] / x[key] - 1 for x, y, key in pairs if key == "loss"])
    assert abs(drift) < DRIFT
    assert a.weights.keys() == b.weights.keys()
    for key, value in a.weights.items():
        assert np.abs(value - b.weights[key]).max() <= WEIGHTS, key


@pytest.mark.parametrize(("rows", "accumulated"), sampled([(1, 8), (2, 4), (4, 2)], (1, 8), (4, 2)))
def test_batch_by_accumulation(rows, accumulated, llama, reference):
    cut = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulated}
    assert_one_curve(reference, run_mlx(llama, {**SETTINGS, **cut}, ROWS, LORA), steps=STEPS)


def test_batch_by_accumulation_with_all_weights(llama):
    settings = {**SETTINGS, "learning_rate": 1e-4}
    cut = {**settings, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    assert_one_curve(run_mlx(llama, settings, ROWS, None), run_mlx(llama, cut, ROWS, None), steps=STEPS)


# Lengths go to a multiple of 32 anyway; 8 leaves them there, 128 makes most of a batch padding.
@pytest.mark.parametrize("multiple", [8, 128])
def test_padding(multiple, llama, reference):
    padded = run_mlx(llama, {**SETTINGS, "pad_to_multiple_of": multiple}, ROWS, LORA)
    assert_one_curve(reference, padded, steps=STEPS)


@pytest.mark.parametrize(("family", "options"), [("llama", {}), ("gemma3_text", {"sliding_window": 16})])
def test_packed_documents_do_not_see_each_other(family, options, tmp_path):
    model = tiny_model(family, tmp_path, **options)
    # All rows in one step, so that packing them cannot change which rows meet in a step.
    whole = {**SETTINGS, "per_device_train_batch_size": len(ROWS), "num_train_epochs": 6}
    packed = {**whole, "packing": True, "packing_strategy": "bfd"}
    assert_one_curve(run_mlx(model, whole, ROWS, LORA), run_mlx(model, packed, ROWS, LORA), steps=6)


LAYOUTS = {
    "padded": {},
    "packed": {"packing": True, "packing_strategy": "bfd_split", "max_length": 64},
    "padding free": {"padding_free": True, "max_length": None, "pad_to_multiple_of": 16},
}


@pytest.mark.parametrize("rows", sampled(LAYOUTS, "packed", "padding free"))
@pytest.mark.parametrize(("family", "options"), [("llama", {}), ("gemma3_text", {"sliding_window": 16})])
def test_rows_that_documents_share(rows, family, options, tmp_path, monkeypatch):
    model, chosen = tiny_model(family, tmp_path, **options), []

    def watch(batches, **options):
        shapes = fit_shapes(batches, **options)
        chosen.extend(shapes.chosen)
        return shapes

    # Short and long ones, so that several short rows fit beside each other.
    mixed = [row if number % 4 else {**row, "completion": row["completion"] * 3} for number, row in enumerate(ROWS)]
    settings = {**SETTINGS, "num_train_epochs": 2, "eval_strategy": "epoch", **LAYOUTS[rows]}
    runs = []
    for fit in (watch, lambda batches, **options: Shapes()):
        monkeypatch.setattr(hf_mlx.feed, "fit_shapes", fit)
        runs.append(run_mlx(model, settings, mixed, LORA, eval_dataset=_rows(mixed[:9])))
    assert any(shape.shared for shape in chosen)
    assert_one_curve(*runs, steps=sum("loss" in entry for entry in runs[0].history))
    assert sum("eval_loss" in entry for entry in runs[0].history) == 2


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "all-weights"])
def test_checkpointed_activations(lora, llama):
    settings = {**SETTINGS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    kept = run_mlx(llama, settings, ROWS, lora)
    recomputed = run_mlx(llama, {**settings, "gradient_checkpointing": True}, ROWS, lora)
    assert_one_curve(kept, recomputed, steps=STEPS)


def test_compiled(llama, reference):
    mx.disable_compile()
    try:
        eager = run_mlx(llama, SETTINGS, ROWS, LORA)
    finally:
        mx.enable_compile()
    assert_one_curve(reference, eager, steps=STEPS)


RANDOM = {
    "dropout": ({}, {**LORA, "lora_dropout": 0.3}),
    "neftune": ({"neftune_noise_alpha": 15.0}, LORA),
    "both": ({"neftune_noise_alpha": 15.0}, {**LORA, "lora_dropout": 0.3}),
}


@pytest.mark.parametrize("kind", sampled(RANDOM, "both"))
def test_random_masks_are_the_same_when_recomputed(kind, llama, reference):
    changed, lora = RANDOM[kind]
    settings = {**SETTINGS, **changed}
    kept = run_mlx(llama, settings, ROWS, lora)
    recomputed = run_mlx(llama, {**settings, "gradient_checkpointing": True}, ROWS, lora)
    assert_one_curve(kept, recomputed, steps=STEPS)
    # They are drawn at all.
    assert kept.history[3]["loss"] != pytest.approx(reference.history[3]["loss"], rel=RELATIVE)


@pytest.mark.parametrize("kind", sampled(RANDOM, "both"))
def test_evaluation_draws_no_masks(kind, llama):
    changed, lora = RANDOM[kind]
    # Nothing has been trained when the first evaluation runs, and with a learning rate of 0 nothing ever is.
    settings = {**SETTINGS, "eval_on_start": True, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 3}
    settings |= {"learning_rate": 0.0, "lr_scheduler_type": "constant", "warmup_steps": 0}
    evaluated = rows_of("prompt", 5, seed=1)
    plain = run_mlx(llama, settings, ROWS, LORA, eval_dataset=_rows(evaluated))
    drawn = run_mlx(llama, {**settings, **changed}, ROWS, lora, eval_dataset=_rows(evaluated))
    losses = [[entry["eval_loss"] for entry in run.history if "eval_loss" in entry] for run in (plain, drawn)]
    assert losses[0] == losses[1] == losses[0][:1] * 4


def _rows(rows):
    from datasets import Dataset

    return Dataset.from_list(rows)
