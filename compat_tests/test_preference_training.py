"""MLXDPOTrainer beside trl.DPOTrainer: every logged value, for each reference and each loss."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset
from pairs import tiny_model
from preference_pairs import REFERENCES, assert_same_log, preference_rows, run_both

RELATIVE = 1e-4
LOSS = 1e-5
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj", "down_proj"], "lora_dropout": 0.1,
        "task_type": "CAUSAL_LM"}  # fmt: skip
SETTINGS = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "max_steps": 4, "learning_rate": 5e-3}
LOSSES = ("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
          "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm")  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("llama"))


def check(model, reference, settings, *, lora=LORA, rows=16, kind="text", **more) -> None:
    settings = SETTINGS | settings
    theirs, ours = run_both(model, settings, preference_rows(kind, rows), reference, lora, **more)
    # exp of a log-ratio, or a steep sigmoid of one, amplifies the rounding of log-probabilities.
    amplified = {"forward_kl", "discopop"} & {settings.get("f_divergence_type"), *settings.get("loss_type", ())}
    loss = RELATIVE if amplified else LOSS
    compared = assert_same_log(
        theirs, ours, relative=RELATIVE, loss=loss, beta=settings.get("beta", 0.1), reference=reference
    )
    assert compared >= 14 * settings["max_steps"]


# The others run in `make compat`.
FEW = ("adapter off", "peft model", "other model, full", "precomputed, full")


@pytest.mark.parametrize(
    "reference", [name if name in FEW else pytest.param(name, marks=pytest.mark.wide) for name in REFERENCES]
)
def test_references(model, reference):
    # 16 rows in batches of 3: the last window of an epoch is short, and so is its last micro-batch.
    check(model, reference, {})


@pytest.mark.wide
@pytest.mark.parametrize("loss", LOSSES)
def test_losses(model, loss):
    check(model, "adapter off", {"loss_type": [loss], "label_smoothing": 0.1})


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        pytest.param({"ld_alpha": 0.3, "loss_type": ["ipo"]}, marks=pytest.mark.wide),
        pytest.param({"use_weighting": True, "f_divergence_type": "js_divergence"}, marks=pytest.mark.wide),
        pytest.param({"loss_type": ["aot"], "max_length": 24, "truncation_mode": "keep_end"}, marks=pytest.mark.wide),
    ],
    ids=["mix", "ld_alpha", "weighting", "aot"],
)
def test_mixes(model, settings):
    check(model, "adapter off", settings | {"max_steps": 3})


@pytest.mark.parametrize("reference", ["adapter off", pytest.param("precomputed", marks=pytest.mark.wide)])
def test_evaluation(model, reference):
    evaluation = Dataset.from_list(preference_rows("text", 7, seed=3))
    settings = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 3}
    check(model, reference, settings, eval_dataset={"a": evaluation, "b": evaluation.select(range(4))})


def test_one_end_of_a_tied_pair_that_trains(tmp_path):
    evaluation = Dataset.from_list(preference_rows("text", 4, seed=3))
    settings = {"max_steps": 2, "eval_strategy": "epoch", "eval_on_start": True}
    model = tiny_model("smollm3", tmp_path)
    check(model, "adapter off", settings, lora=LORA | {"modules_to_save": ["embed_tokens"]}, eval_dataset=evaluation)


@pytest.mark.parametrize("reference", ["full", pytest.param("other model, full", marks=pytest.mark.wide)])
def test_a_reference_that_follows_the_policy(model, reference):
    evaluation = Dataset.from_list(preference_rows("text", 5, seed=3))
    settings = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.7, "max_steps": 5,
                "eval_strategy": "steps", "eval_steps": 2}  # fmt: skip
    check(model, reference, settings, eval_dataset=evaluation)
