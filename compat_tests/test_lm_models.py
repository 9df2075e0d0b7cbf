"""MLXTrainer beside transformers.Trainer on models whose loss is counted another way, and what is refused by name."""

import random

import pytest
import torch
from lm_draws import draw_rows, own_loss
from lm_pairs import run, run_both
from pairs import assert_same_log, untimed
from peft import LoraConfig, get_peft_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
)

from hf_mlx import MLXTrainer, explain
from hf_mlx.errors import DataError, SettingError, TrainingError

pytestmark = pytest.mark.usefixtures("uncompiled")

RELATIVE = 1e-4
SETTINGS = {
    "per_device_train_batch_size": 3,
    "per_device_eval_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 4,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 2,
}
SIZES = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 2, "router_aux_loss_coef": 0.05,
}  # fmt: skip


def qwen(**options):
    torch.manual_seed(5)
    chosen = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **chosen, **{"output_router_logits": True, **options}))


def mixtral():
    torch.manual_seed(5)
    options = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None, "output_router_logits": True}
    return MixtralForCausalLM(MixtralConfig(**SIZES, **options))


def adapted():
    torch.manual_seed(5)
    return get_peft_model(qwen(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


def unseeded_gpt2():
    sizes = {"vocab_size": 320, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def gpt2():
    torch.manual_seed(5)
    return unseeded_gpt2()


def keywords(**more):
    options = {"padded": True, "side": "right", "masks": "plain", "labels": "some"}
    rows, held = (draw_rows(random.Random(seed), count, **options) for seed, count in ((1, 11), (2, 5)))
    return {"train_dataset": rows, "eval_dataset": held, **more}


MODELS = {
    "gpt2": (gpt2, {}),
    "experts": (qwen, {}),
    "experts, LoRA": (adapted, {}),
    "mixtral": (mixtral, {}),
    "gpt2, smoothed": (gpt2, {"label_smoothing_factor": 0.1}),
    "experts, smoothed": (qwen, {"label_smoothing_factor": 0.1}),
    "routers unasked": (lambda: qwen(output_router_logits=False), {}),
}
SAMPLE = 4


@pytest.mark.parametrize(
    "name",
    [*list(MODELS)[:SAMPLE], *(pytest.param(name, marks=pytest.mark.wide) for name in list(MODELS)[SAMPLE:])],
)
def test_the_curve_of_other_models(name):
    """GPT-2's loss is divided by first labels too, in evaluation as well; the routers' loss is the model's own."""
    make, settings = MODELS[name]
    (theirs, _), (ours, _) = run_both(make, SETTINGS | settings, keywords)
    assert_same_log(untimed(theirs), untimed(ours), relative=RELATIVE)
    assert len(ours) == 7


def test_a_gpt2_with_a_loss_of_the_scripts_own():
    made = [untimed(log) for log, _ in run_both(gpt2, SETTINGS, lambda: keywords(compute_loss_func=own_loss))]
    assert_same_log(*made, relative=RELATIVE)


def test_a_model_that_is_made_by_the_trainer():
    """What model_init draws decides the order of the rows, too, where that goes by torch's generator."""
    made, settings = [], {**SETTINGS, "train_sampling_strategy": "group_by_length"}
    for cls in (Trainer, MLXTrainer):
        log, trainer = run(cls, None, settings, **keywords(model_init=unseeded_gpt2))
        made.append(untimed(log))
    assert_same_log(*made, relative=RELATIVE)
    with pytest.raises(SettingError, match=r"train\(\) again on a trainer with model_init"):
        trainer.train()


def test_predictions_that_would_hold_router_logits_are_refused():
    options = {"compute_metrics": lambda given: {"seen": float(given.predictions.ndim)}}
    settings = {**SETTINGS, "eval_strategy": "no", "max_steps": 1}
    _, trainer = run(MLXTrainer, qwen(), settings, **keywords(**options))
    with pytest.raises(SettingError, match=r"aux_loss and router_logits(.|\n)*output_router_logits = False"):
        trainer.evaluate()
    found = trainer.evaluate(ignore_keys=["past_key_values", "aux_loss", "router_logits"])
    assert found["eval_seen"] == 3
    with pytest.raises(SettingError, match="ignore_keys=None"):
        trainer.predict(keywords()["eval_dataset"], ignore_keys=["logits"])


def test_remedies_name_the_classes_in_use():
    with pytest.raises(SettingError, match=r"remedy: model\.config\.output_router_logits = False"):
        run(MLXTrainer, qwen(), SETTINGS, **keywords(compute_loss_func=own_loss))
    _, trainer = run(MLXTrainer, gpt2(), {**SETTINGS, "max_steps": 1}, **keywords())
    with pytest.raises(SettingError, match=r"remedy: MLXTrainer\(model=my_model"):
        trainer.model = gpt2()
    with pytest.raises(SettingError, match=r"MLXTrainer\(args=TrainingArguments\(learning_rate"):
        trainer.hyperparameter_search()
    assert explain(trainer.args)["label_names"].verdict == "HONOUR"
    assert "loss_type" not in {entry.field for entry in explain(trainer.args).entries}


def test_labels_that_torch_has_no_class_for():
    """transformers raises IndexError."""
    rows = keywords()["train_dataset"]
    rows[0]["labels"][1] = -5
    with pytest.raises(DataError, match="Target -5 is out of bounds"):
        run(MLXTrainer, gpt2(), {**SETTINGS, "eval_strategy": "no", "num_train_epochs": 1}, train_dataset=rows)


def test_a_loss_that_is_lost():
    """transformers goes on with weights that are NaN."""
    with pytest.raises(TrainingError, match="a loss of nan at step"):
        run(MLXTrainer, gpt2(), {**SETTINGS, "learning_rate": 1e9, "max_steps": 10}, **keywords())
