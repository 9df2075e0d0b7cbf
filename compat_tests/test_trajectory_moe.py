"""The same curve as TRL on mixture-of-experts models: the routers' load-balancing loss is on by default."""

import numpy as np
import pytest
import torch
from architecture_zoo import make_model
from datasets import Dataset
from pairs import SILENT, assert_same_curve, mean_drift, rows_of, run_both, tokenizer
from peft import LoraConfig
from sampling import sampled
from trl import SFTConfig

from hf_mlx import MLXSFTTrainer
from hf_mlx.errors import ModelError, SettingError

# fp32 on both sides; the order of sums in a matmul is all that differs. 1e-4 is the promise of the library.
RELATIVE = 1e-4
WEIGHTS = 1e-4
DRIFT = 1e-6

# Large, so that the loss of the routers is a visible part of the gradient; None is the config's own coefficient.
LARGE = 0.5
SETTINGS = {
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "gradient_accumulation_steps": 3,
    "num_train_epochs": 1,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "eval_strategy": "epoch",
    "max_length": 48,
    "gradient_checkpointing": False,
    "router_aux_loss_coef": LARGE,
}
ATTENTION = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
# 9 rows in pairs: the second window has two micro-batches, the last of them one row.
ROWS = rows_of("prompt", 9)

FAMILIES = [
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_5_moe_text",
    "olmoe",
    "jamba",
    "minimax_m2",
    "mellum",
    "lfm2_moe",
    "afmoe",
    "ernie4_5_moe",
    "gpt_oss",
]
# Of these TRL asks for the processor of their images, unless it is given a tokenizer.
MULTIMODAL = ["qwen3_5_moe", "qwen3_vl_moe"]


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    """Folder of a tiny model of a type, made once."""
    made = {}

    def get(model_type, **options):
        key = (model_type, *sorted(options))
        if key not in made:
            made[key] = tmp_path_factory.mktemp(model_type)
            make_model(model_type, vocab_size=len(tokenizer()), **options).save_pretrained(made[key])
            tokenizer().save_pretrained(made[key])
        return made[key]

    return get


def held_out():
    return Dataset.from_list(rows_of("prompt", 5, seed=3))


def assert_balanced(theirs, ours, *, weights=WEIGHTS, steps=2, epochs=1):
    """Both curves agree, and both log the routers' loss of every step and evaluation."""
    logged = [key for entry in ours.history for key in entry if key.endswith("aux_loss")]
    assert logged == (["aux_loss"] * steps + ["eval_aux_loss"]) * epochs
    assert assert_same_curve(theirs, ours, relative=RELATIVE, weights=weights) >= 5 * steps * epochs
    assert abs(mean_drift(theirs, ours)) < DRIFT


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("model_type", sampled(FAMILIES, "mixtral", "qwen2_moe", "qwen3_next", "minimax_m2", "gpt_oss"))
def test_adapter_on_attention(model_type, moe):
    assert_balanced(*run_both(moe(model_type), SETTINGS, ROWS, ATTENTION, eval_dataset=held_out()))


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("model_type", MULTIMODAL)
def test_text_of_a_model_that_sees(model_type, moe):
    settings = {**SETTINGS, "eval_strategy": "no"}
    theirs, ours = run_both(moe(model_type), settings, ROWS, ATTENTION, processing_class=tokenizer())
    assert any("aux_loss" in entry for entry in theirs.history)
    assert assert_same_curve(theirs, ours, relative=RELATIVE, weights=WEIGHTS) >= 10


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    "model_type",
    sampled(FAMILIES, "qwen3_moe", "gpt_oss"),
)
def test_adapter_on_experts_and_routers(model_type, moe):
    lora = {**ATTENTION, "target_modules": "all-linear"}
    # Single gradients of the delta rule's gates are nothing but rounding, 1e-9 in float64: Adam gives them a step of
    # full size, and TRL's own fp32 run leaves its float64 run there. With this epsilon their steps are as small.
    settings = {**SETTINGS, "adam_epsilon": 1e-6}
    theirs, ours = run_both(moe(model_type), settings, ROWS, lora, eval_dataset=held_out())
    assert len(ours.weights) >= 16
    assert_balanced(theirs, ours)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("model_type", sampled([*FAMILIES, "laguna"], "mixtral", "jamba", "ernie4_5_moe"))
def test_all_weights_with_checkpointing(model_type, moe):
    # Losses of 7 are 5e-7 apart at the least, so that a mean over two of them says nothing below 1e-6 yet.
    settings = {**SETTINGS, "gradient_checkpointing": True, "learning_rate": 1e-4, "num_train_epochs": 3}
    theirs, ours = run_both(moe(model_type), settings, ROWS, None, eval_dataset=held_out())
    # Experts are stacked under other names here; the second step's loss and norm depend on every weight.
    theirs.weights, ours.weights = {}, {}
    assert_balanced(theirs, ours, epochs=3)


@pytest.mark.parametrize("model_type", sampled(["mixtral", "olmoe"], "mixtral"))
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_accumulation_and_checkpointing(model_type, checkpointing, accumulation, moe):
    settings = {**SETTINGS, "gradient_accumulation_steps": accumulation, "gradient_checkpointing": checkpointing}
    theirs, ours = run_both(moe(model_type), settings, ROWS, ATTENTION, eval_dataset=held_out())
    assert_balanced(theirs, ours, steps=5 if accumulation == 1 else 2)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("model_type", sampled(["mixtral", "qwen3_moe", "minimax_m2"], "mixtral"))
@pytest.mark.parametrize(
    "packing", [{"packing": True}, {"padding_free": True}, {"packing": True, "packing_strategy": "wrapped"}]
)
def test_packed_rows(model_type, packing, moe):
    rows, model = rows_of("text", 12), moe(model_type, **({"sliding_window": None} if model_type == "mixtral" else {}))
    # TRL takes max_length with padding_free only where it packs.
    length = None if "padding_free" in packing else 64
    settings = {**SETTINGS, **packing, "max_length": length, "gradient_accumulation_steps": 2, "eval_strategy": "no"}
    theirs, ours = run_both(model, settings, rows, ATTENTION)
    assert sum("aux_loss" in entry for entry in ours.history) == sum("aux_loss" in entry for entry in theirs.history)
    assert assert_same_curve(theirs, ours, relative=RELATIVE, weights=WEIGHTS) >= 12


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    ("settings", "logs"),
    [
        ({"router_aux_loss_coef": None}, True),
        ({"router_aux_loss_coef": 0.0}, False),
        ({"label_smoothing_factor": 0.1}, True),
        ({"loss_type": "dft"}, True),
    ],
    ids=["the config's own", "off", "smoothed labels", "dft"],
)
def test_when_it_counts(settings, logs, moe):
    theirs, ours = run_both(moe("mixtral"), {**SETTINGS, **settings}, ROWS, ATTENTION, eval_dataset=held_out())
    assert any("aux_loss" in entry for entry in ours.history) is logs
    assert assert_same_curve(theirs, ours, relative=RELATIVE, weights=WEIGHTS) >= 10


@pytest.mark.usefixtures("uncompiled")
def test_a_model_that_was_handed_over(moe):
    from transformers import AutoModelForCausalLM

    def load():
        return AutoModelForCausalLM.from_pretrained(moe("qwen3_moe"), dtype=torch.float32)

    theirs, ours = run_both(load, SETTINGS, ROWS, ATTENTION, eval_dataset=held_out(), processing_class=tokenizer())
    assert_balanced(theirs, ours)


def trainer(folder, out, **settings):
    return MLXSFTTrainer(
        str(folder),
        SFTConfig(output_dir=str(out), **{**SILENT, **SETTINGS, **settings}),
        train_dataset=Dataset.from_list(ROWS),
        eval_dataset=held_out(),
        peft_config=LoraConfig(**ATTENTION),
    )


@pytest.mark.usefixtures("uncompiled")
def test_resumed_runs_go_on_with_the_same_curve(moe, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "logging_steps": 2, "num_train_epochs": 2}
    whole = trainer(moe("mixtral"), tmp_path, **settings)
    whole.train()
    resumed = trainer(moe("mixtral"), tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    pairs = [
        (a["aux_loss"], b["aux_loss"])
        for a, b in zip(whole.state.log_history, resumed.state.log_history, strict=True)
        if "aux_loss" in a
    ]
    assert len(pairs) == 2
    assert all(a == b for a, b in pairs)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", ["granitemoe", "granitemoehybrid"])
def test_granite_computes_what_transformers_computes(model_type, moe, tmp_path):
    # trl 1.16 raises AttributeError here (it reads config.num_experts); the measure is transformers' own forward.
    from transformers import AutoModelForCausalLM

    ours = trainer(moe(model_type), tmp_path, per_device_eval_batch_size=8)
    metrics = ours.evaluate()
    model = AutoModelForCausalLM.from_pretrained(moe(model_type), dtype=torch.float32).eval()
    rows = ours.eval_dataset["input_ids"]
    width = max(len(row) for row in rows)
    ids = torch.tensor([row + [2] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    with torch.no_grad():
        aux_loss = model(ids, attention_mask=mask, output_router_logits=True, use_cache=False).aux_loss.item()
    logged = ours.state.log_history[-1]["eval_aux_loss"]
    assert logged == pytest.approx(aux_loss, rel=RELATIVE)
    off = trainer(moe(model_type), tmp_path, per_device_eval_batch_size=8, router_aux_loss_coef=0.0).evaluate()
    assert metrics["eval_loss"] - off["eval_loss"] == pytest.approx(LARGE * aux_loss, rel=RELATIVE)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.filterwarnings("ignore")
def test_the_config_that_is_saved_says_so(moe, tmp_path):
    from transformers import AutoConfig

    for coefficient, enabled in ((LARGE, True), (0.0, False)):
        made = trainer(moe("olmoe"), tmp_path, router_aux_loss_coef=coefficient)
        assert made.model.config.output_router_logits is enabled
        whole = MLXSFTTrainer(
            str(moe("olmoe")),
            made.args,
            train_dataset=Dataset.from_list(ROWS),
            eval_dataset=held_out(),
        )
        whole.save_model(str(tmp_path / "saved"))
        config = AutoConfig.from_pretrained(tmp_path / "saved")
        assert (config.output_router_logits, config.router_aux_loss_coef) == (enabled, coefficient)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("model_type", "coefficient", "error"),
    [("llama", LARGE, SettingError), ("glm4_moe", LARGE, ModelError), ("llama4_text", None, ModelError)],
)
def test_what_cannot_be_balanced_is_refused(model_type, coefficient, error, moe, tmp_path):
    with pytest.raises(error, match="router_aux_loss_coef"):
        trainer(moe(model_type), tmp_path, router_aux_loss_coef=coefficient)
    # The remedy holds.
    metrics = trainer(moe(model_type), tmp_path, router_aux_loss_coef=0.0).evaluate()
    assert np.isfinite(metrics["eval_loss"])
