"""What else a preference script may bring: streams, collators and metrics of its own, tools, experts, bf16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from datasets import Dataset
from pairs import tiny_model
from preference_pairs import assert_same_log, preference_rows, run_both
from training_checks import make_base
from trl import DPOConfig
from trl.trainer.dpo_trainer import DataCollatorForPreference

from hf_mlx import MLXDPOTrainer
from hf_mlx.errors import SettingError

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj"], "task_type": "CAUSAL_LM"}
SETTINGS = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "max_steps": 3, "learning_rate": 2e-3}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(autouse=True)
def uncompiled():
    # The functions are the same; compiled they are compared in test_preference_training.
    mx.disable_compile()
    yield
    mx.enable_compile()


def check(model: Path, settings: dict[str, Any], rows: Any, *, relative: float = 1e-4, **more: Any) -> tuple[Any, Any]:
    theirs, ours = run_both(model, SETTINGS | settings, rows, "adapter off", LORA, **more)
    assert assert_same_log(theirs, ours, relative=relative) >= 42
    return theirs, ours


def test_a_stream(model):
    rows = Dataset.from_list(preference_rows("text", 16)).to_iterable_dataset()
    check(model, {}, rows)


def test_a_collator_of_its_own(model):
    class Collator(DataCollatorForPreference):
        """Leaves the last token of every answer out of the loss."""

        def __call__(self, examples: list[dict[str, Any]], return_tensors: str | None = None) -> dict[str, Any]:
            batch = super().torch_call(examples)
            last = batch["attention_mask"].sum(dim=1) - 1
            batch["completion_mask"][range(len(last)), last] = 0
            return batch

    check(model, {}, preference_rows("text", 13), data_collator=Collator(pad_token_id=2, max_length=40))


def test_metrics_of_its_own(model):
    seen: list[Any] = []

    def compute_metrics(prediction: Any) -> dict[str, float]:
        logits, ids = prediction.predictions, prediction.label_ids
        seen.append((np.asarray(logits), np.asarray(ids)))
        return {"mean_top": float(np.abs(logits[:, 0]).max(axis=-1).mean()), "ids": float(ids.sum())}

    evaluation = Dataset.from_list(preference_rows("text", 7, seed=3))
    settings = {"eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 4}
    theirs, ours = check(
        model, settings, preference_rows("text", 13), eval_dataset=evaluation, compute_metrics=compute_metrics
    )
    assert all("eval_ids" in trainer.state.log_history[3] for trainer in (theirs, ours))
    (logits, ids), (our_logits, our_ids) = seen
    assert logits.shape == our_logits.shape and np.array_equal(ids, our_ids)
    # Of 7 pairs in batches of 4 the last, short one keeps as many rows as it has pairs: accelerate counts pairs.
    assert len(ids) == 8 + 3
    told = (ids != -100) & (ids != 2)
    np.testing.assert_allclose(our_logits[told], logits[told], atol=1e-4)


@pytest.mark.wide
def test_tools(model):
    tool = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}
    rows = [{**row, "tools": [tool]} for row in preference_rows("chat", 13)]
    check(model, {"padding_free": True}, rows)


@pytest.mark.parametrize("coefficient", [None, pytest.param(0.0, marks=pytest.mark.wide)])
def test_experts(tmp_path, coefficient):
    model = make_base("qwen3_moe", tmp_path, router_aux_loss_coef=0.01)
    theirs, _ = check(model, {"router_aux_loss_coef": coefficient}, preference_rows("text", 16))
    assert ("aux_loss" in theirs.state.log_history[0]) == (coefficient is None)


@pytest.mark.wide
def test_bf16(model):
    # Half precision rounds each layer's activations at 4e-3; how far TRL's own numbers lie apart between two CPUs.
    theirs, ours = run_both(model, {**SETTINGS, "bf16": True}, preference_rows("text", 16), "adapter off", LORA)
    for a, b in zip(theirs.state.log_history, ours.state.log_history, strict=True):
        assert list(a) == list(b)
        for key in ("loss", "logps/chosen", "logps/rejected", "entropy"):
            if key in a:
                assert b[key] == pytest.approx(a[key], rel=5e-3), (a["step"], key)
    assert ours.state.log_history[0]["rewards/accuracies"] == 0


def test_remedies_name_the_trainer_and_its_configuration(model, tmp_path):
    stream = Dataset.from_list(preference_rows("text", 4)).to_iterable_dataset()
    with pytest.raises(SettingError, match=r"DPOConfig\(max_steps=") as raised:
        MLXDPOTrainer(str(model), args=DPOConfig(str(tmp_path), use_cpu=True, bf16=False), train_dataset=stream)
    assert "SFT" not in str(raised.value)
