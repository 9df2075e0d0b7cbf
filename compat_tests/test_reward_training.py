"""MLXRewardTrainer beside trl.RewardTrainer: every logged value, for each way that a model comes in."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from datasets import Dataset, IterableDataset
from pairs import SILENT, _quiet, tiny_model, tokenizer
from reward_pairs import MODELS, assert_same_log, load, reward_rows, run, run_both
from trl import RewardConfig, RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference

from hf_mlx import MLXRewardTrainer

RELATIVE = 1e-4
LOSS = 1e-5
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj", "down_proj"], "lora_dropout": 0.1,
        "task_type": "SEQ_CLS"}  # fmt: skip
SETTINGS = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "max_steps": 4, "learning_rate": 5e-3}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("llama") / "model")


def check(folder, how, settings, *, lora=LORA, rows=16, kind="text", margin=False, **more):
    settings = SETTINGS | settings
    made = reward_rows(kind, rows, margin=margin)
    theirs, ours = run_both(folder, settings, made, how, lora, **more)
    compared = assert_same_log(theirs, ours, relative=RELATIVE, loss=LOSS)
    assert compared >= 10 * settings["max_steps"]
    return theirs, ours


# The others run in `make compat`.
FEW = ("name", "object, full")


@pytest.mark.parametrize(
    "how", [name if name in FEW else pytest.param(name, marks=pytest.mark.wide) for name in MODELS]
)
def test_models(model, how):
    # 16 rows in batches of 3: the last window of an epoch is short, and so is its last micro-batch.
    check(model, how, {})


@pytest.mark.parametrize(
    "settings",
    [
        {"center_rewards_coefficient": 0.1},
        pytest.param({"center_rewards_coefficient": -0.01, "max_grad_norm": 0.1}, marks=pytest.mark.wide),
        pytest.param({"max_length": 24, "pad_to_multiple_of": 8}, marks=pytest.mark.wide),
        pytest.param({"eos_token": "<|im_end|>"}, marks=pytest.mark.wide),
        # EOS ends each row and pads it: the score is read before it.
        {"pad_token": "</s>"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings(model, settings):
    check(model, "name", settings, margin=True)


@pytest.mark.wide
@pytest.mark.parametrize("task", [None, "modules_to_save"])
def test_adapters_of_no_task(model, task):
    # PEFT then adapts the score as a Linear like any other, or trains it where it is told to.
    lora = {"r": 2, "target_modules": "all-linear"}
    if task is not None:
        lora |= {"target_modules": ["q_proj"], "modules_to_save": ["score"]}
    check(model, "object", {"max_steps": 3}, lora=lora)


@pytest.mark.parametrize("how", ["name", pytest.param("object, full", marks=pytest.mark.wide)])
def test_evaluation(model, how):
    rows = Dataset.from_list(reward_rows("chat", 7, seed=3))
    settings = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 3, "eval_on_start": True}
    held_out = Dataset.from_list(reward_rows("chat", 5, seed=9))
    theirs, ours = check(
        model,
        how,
        settings,
        kind="chat",
        eval_dataset={"a": rows, "b": rows.select(range(4))},
        then=lambda trainer: trainer.evaluate(held_out, metric_key_prefix="test"),
    )
    a, b = theirs.found, ours.found
    assert abs(a["test_loss"] - b["test_loss"]) <= LOSS * a["test_loss"]
    assert [key for key in a if "time" not in key] == [key for key in b if "time" not in key]


@pytest.mark.parametrize(
    "settings",
    [
        {"include_for_metrics": ["inputs", "loss"]},
        pytest.param({"batch_eval_metrics": True}, marks=pytest.mark.wide),
        pytest.param({"eval_do_concat_batches": False}, marks=pytest.mark.wide),
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_metrics_and_predictions(model, settings):
    """``compute_metrics`` is called with all rewards and no labels, and predictions are those rewards."""
    rows = Dataset.from_list(reward_rows("text", 7, seed=3))
    called = []

    def measure(prediction, compute_result=True):
        called.append(prediction)
        return {"largest": float(np.max([np.max(np.asarray(part)) for part in prediction.predictions]))}

    def predict(trainer):
        prepared = rows if isinstance(trainer, MLXRewardTrainer) else trainer._prepare_dataset(
            rows, trainer.processing_class, trainer.args, "test"
        )  # fmt: skip
        found, seen = trainer.predict(prepared), list(called)
        called.clear()
        return found, seen

    settings = {"per_device_eval_batch_size": 3, "max_steps": 1, "eval_strategy": "steps", **settings}
    theirs, ours = check(model, "name", settings, eval_dataset=rows, compute_metrics=measure, then=predict)
    (a, calls), (b, ours_calls) = theirs.found, ours.found
    assert len(calls) == len(ours_calls) >= 2
    for want, got in [(a, b), *zip(calls, ours_calls, strict=True)]:
        assert want.label_ids == got.label_ids
        listed = [want.predictions, got.predictions]
        listed = listed if isinstance(want.predictions, list) else [[part] for part in listed]
        assert [np.shape(part) for part in listed[0]] == [np.shape(part) for part in listed[1]]
        for x, y in zip(*listed, strict=True):
            np.testing.assert_allclose(y, x, atol=1e-5)
    for want, got in zip(calls, ours_calls, strict=True):
        for name in ("inputs", "losses"):
            x, y = getattr(want, name), getattr(got, name)
            assert (x is None) == (y is None)
            if x is not None:
                np.testing.assert_allclose(y, x, atol=1e-5)
    assert a.metrics.keys() == b.metrics.keys()
    assert abs(a.metrics["test_loss"] - b.metrics["test_loss"]) <= LOSS


@pytest.mark.wide
def test_a_stream(model):
    def rows():
        yield from reward_rows("text", 9, margin=True)

    for_each = [
        run(cls, model, SETTINGS, IterableDataset.from_generator(rows), "name", LORA)
        for cls in (RewardTrainer, MLXRewardTrainer)
    ]
    assert assert_same_log(*for_each, relative=RELATIVE, loss=LOSS) >= 40


@pytest.mark.wide
def test_a_collator_of_the_scripts_own(model):
    class Reversed(DataCollatorForPreference):
        def torch_call(self, examples):
            return super().torch_call(examples[::-1])

    check(model, "name", {"max_steps": 2}, margin=True, data_collator=Reversed(pad_token_id=2))


@pytest.mark.parametrize(
    ("width", "dtype"),
    [
        (64, "bfloat16"),
        *[
            pytest.param(*drawn, marks=pytest.mark.wide)
            for drawn in ((64, "float32"), (64, "float16"), (8, "bfloat16"))
        ],
    ],
)
def test_a_score_that_is_drawn_is_torchs(tmp_path, dtype, width):
    folder = tiny_model("qwen2", tmp_path / "model", hidden_size=width, num_attention_heads=2, intermediate_size=16)
    settings = {"max_steps": 1, "seed": 11, "learning_rate": 0.0, "model_init_kwargs": {"dtype": dtype}}
    theirs, ours = run_both(folder, settings, reward_rows("text", 4), "name, full", LORA)
    want, got = theirs.model.score.weight.detach(), ours.session.step.params["score.weight"]
    assert str(want.dtype).rpartition(".")[2] == str(got.dtype).rpartition(".")[2] == dtype
    # torch has its own vector log and cosine.
    np.testing.assert_allclose(np.array(got.astype(mx.float32)), want.float().numpy(), rtol=1e-5, atol=1e-8)


@pytest.mark.wide
def test_bfloat16_is_within_its_rounding(model):
    theirs, ours = run_both(model, {**SETTINGS, "bf16": True}, reward_rows("text", 16), "name", LORA)
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (theirs, ours)]
    assert len(losses[0]) == 4
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-2)


def test_the_model_that_is_shown(model):
    """``trainer.model`` of a name: scores rows as the object does that trl hands out."""
    theirs, ours = check(model, "name", {"max_steps": 2})
    tokens = ours.processing_class(["a curve", "what it means to us"], padding=True, return_tensors="pt")
    given = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    theirs.model.eval()
    want, got = theirs.model(**given).logits.detach(), ours.model(**given).logits
    assert got.shape == (2, 1)
    np.testing.assert_allclose(got.numpy(), want.numpy(), atol=1e-6)
    assert ours.model.config.num_labels == 1 and ours.model.config.architectures == ["LlamaForSequenceClassification"]
    names = [[name for name, value in t.model.named_parameters() if value.requires_grad] for t in (theirs, ours)]
    assert names[0] == names[1] and names[1][-1].endswith("score.modules_to_save.default.weight")


def test_the_object_holds_what_was_trained(model):
    held = load(model)
    first = held.score.weight.detach().clone()
    rows = Dataset.from_list(reward_rows("text", 4))
    with _quiet() as output:
        args = RewardConfig(output, **SILENT, max_steps=1)
        trainer = MLXRewardTrainer(held, args, train_dataset=rows, processing_class=tokenizer())
        trainer.train()
    assert trainer.model is held and (held.score.weight != first).any()
    ours = np.array(trainer.session.step.params["score.weight"])
    np.testing.assert_array_equal(held.score.weight.detach().numpy(), ours)
