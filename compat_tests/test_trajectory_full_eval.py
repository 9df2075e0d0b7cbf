"""bf16_full_eval: evaluate() and predict() outside of train() in bfloat16, without a trace in what is trained."""

import mlx.core as mx
import numpy as np
import pytest
from datasets import Dataset
from mlx.utils import tree_flatten
from pairs import SILENT, rows_of, text_rows, tiny_model
from peft import LoraConfig
from sampling import sampled
from trl import SFTConfig, SFTTrainer

from hf_mlx import MLXSFTTrainer

pytestmark = pytest.mark.filterwarnings("ignore")

# bfloat16 keeps 8 bits: the same sums in another order differ by 2^-9 of a logit, averaged over some hundred tokens.
CLOSE = 2e-3
SETTINGS = {
    "per_device_train_batch_size": 2,
    "max_steps": 3,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "max_length": 64,
    "gradient_checkpointing": False,
}
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def make(trainer, model, out, lora=LORA, **settings):
    return trainer(
        str(model),
        SFTConfig(output_dir=str(out), **{**SILENT, **SETTINGS, **settings}),
        train_dataset=Dataset.from_list(text_rows(12)),
        eval_dataset=Dataset.from_list(rows_of("text", 8, seed=5)),
        peft_config=LoraConfig(**lora) if lora else None,
    )


@pytest.mark.parametrize("family", sampled(["llama", "qwen3", "gemma3_text"], "llama"))
@pytest.mark.parametrize("lora", [LORA, None], ids=["adapter", "all weights"])
def test_the_loss_is_that_of_torch_in_bfloat16(family, lora, tmp_path):
    model = tiny_model(family, tmp_path / "model")
    losses = {}
    for name, trainer in (("theirs", SFTTrainer), ("ours", MLXSFTTrainer)):
        made = make(trainer, model, tmp_path / name, lora, bf16_full_eval=True)
        made.train()
        losses[name] = made.evaluate()["eval_loss"]
    exact = make(MLXSFTTrainer, model, tmp_path / "exact", lora)
    exact.train()
    exact = exact.evaluate()["eval_loss"]
    assert losses["ours"] == pytest.approx(losses["theirs"], rel=CLOSE)
    # Another number than in fp32, and no farther from it than torch's by more than rounding.
    assert losses["ours"] != exact
    assert losses["ours"] == pytest.approx(exact, rel=2 * CLOSE)


@pytest.mark.parametrize("lora", [LORA, None], ids=["adapter", "all weights"])
def test_training_afterwards_is_as_if_nothing_was_evaluated(lora, tmp_path):
    model = tiny_model("llama", tmp_path / "model")
    plain = make(MLXSFTTrainer, model, tmp_path / "plain", lora)
    cast = make(MLXSFTTrainer, model, tmp_path / "cast", lora, bf16_full_eval=True)
    before = {name: value.dtype for name, value in tree_flatten(cast.session.loaded.model.parameters())}
    first = cast.evaluate()["eval_loss"]
    predictions = cast.predict(cast.eval_dataset).predictions
    assert np.array_equal(predictions, np.array(mx.array(predictions).astype(mx.bfloat16).astype(mx.float32)))
    plain.train()
    cast.train()
    assert {n: v.dtype for n, v in tree_flatten(cast.session.loaded.model.parameters())} == before
    assert set(before.values()) == {mx.float32}
    curves = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (plain, cast)]
    assert len(curves[0]) == 3
    assert curves[0] == curves[1]
    for name, value in plain.session.step.params.items():
        assert mx.array_equal(value, cast.session.step.params[name]), name
    # What was trained is what is evaluated.
    assert cast.evaluate()["eval_loss"] < first


def test_evaluation_during_training_is_exact(tmp_path):
    model = tiny_model("llama", tmp_path / "model")
    found = []
    for name, settings in (("plain", {}), ("cast", {"bf16_full_eval": True})):
        made = make(MLXSFTTrainer, model, tmp_path / name, eval_strategy="steps", eval_steps=1, **settings)
        made.train()
        found.append([entry["eval_loss"] for entry in made.state.log_history if "eval_loss" in entry])
    assert len(found[0]) == 3
    assert found[0] == found[1]
