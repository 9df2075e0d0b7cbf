"""A torch model handed to the trainer: trained like TRL trains it, and with the weights back inside."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from datasets import Dataset
from dropin_models import MODELS, ROWS, losses, make_model, make_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import SFTConfig, SFTTrainer

from hf_mlx import MLXSFTTrainer
from hf_mlx.errors import SettingError

# fp32 on both sides; six optimizer steps apart.
LOSS = 2e-6
# Relative to the largest weight; Adam turns a gradient near zero into a step of its learning rate.
WEIGHT = 5e-4


def _arguments(folder: Any, **changes: Any) -> SFTConfig:
    settings = dict(
        output_dir=str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=6,
        learning_rate=1e-3, lr_scheduler_type="cosine", warmup_steps=2, logging_steps=1, bf16=False, use_cpu=True,
        report_to="none", disable_tqdm=True, save_strategy="no", gradient_checkpointing=False, weight_decay=0.01,
    )  # fmt: skip
    return SFTConfig(**settings | changes)


def _train(trainer: type, folder: Any, model: Any, **keywords: Any) -> Any:
    made = trainer(
        model, _arguments(folder), train_dataset=Dataset.from_list(ROWS), processing_class=make_tokenizer(), **keywords
    )
    made.train()
    return made


def _lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") | changes)


def _compare(theirs: Any, ours: Any) -> None:
    expected, found = losses(theirs.state.log_history), losses(ours.state.log_history)
    assert len(found) == 6
    assert found == pytest.approx(expected, rel=LOSS)
    pairs = list(zip(theirs.model.named_parameters(), ours.model.named_parameters(), strict=True))
    assert len(pairs) > 10
    for (name, wanted), (mine, value) in pairs:
        assert mine == name
        assert (value - wanted).abs().max() <= WEIGHT * wanted.abs().max(), name


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("kind", MODELS)
def test_full_fine_tuning_ends_in_the_object(kind, tmp_path):
    theirs = _train(SFTTrainer, tmp_path / "trl", make_model(kind))
    model = make_model(kind)
    ours = _train(MLXSFTTrainer, tmp_path / "mlx", model)
    assert ours.model is model
    _compare(theirs, ours)


CONFIGS = {
    "plain": {},
    "dora": {"use_dora": True},
    "all-linear": {"target_modules": "all-linear"},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "patterns": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}, "use_rslora": True},
}


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("config", CONFIGS)
def test_a_peft_model_starts_from_its_own_weights(config, tmp_path):
    def wrap() -> Any:
        model = get_peft_model(make_model(), _lora(**CONFIGS[config]))
        torch.manual_seed(5)
        with torch.no_grad():
            for name, value in model.named_parameters():
                if "lora_B" in name:
                    value.add_(0.02 * torch.randn_like(value))
        return model

    theirs = _train(SFTTrainer, tmp_path / "trl", wrap())
    model = wrap()
    ours = _train(MLXSFTTrainer, tmp_path / "mlx", model)
    assert ours.model is model
    _compare(theirs, ours)


@pytest.mark.parametrize("kind", MODELS)
def test_peft_config_on_an_object_begins_where_peft_begins(kind, tmp_path):
    targets = {"target_modules": ["qkv_proj"]} if kind == "phi3" else {}
    theirs = _train(SFTTrainer, tmp_path / "trl", make_model(kind), peft_config=_lora(**targets))
    ours = _train(MLXSFTTrainer, tmp_path / "mlx", make_model(kind), peft_config=_lora(**targets))
    assert isinstance(ours.model, PeftModel)
    _compare(theirs, ours)


def test_frozen_parameters_stay_as_they_were(tmp_path):
    def freeze() -> Any:
        model = make_model()
        for name, value in model.named_parameters():
            value.requires_grad_("layers.0" not in name and "embed" not in name)
        return model

    theirs = _train(SFTTrainer, tmp_path / "trl", freeze())
    ours = _train(MLXSFTTrainer, tmp_path / "mlx", freeze())
    _compare(theirs, ours)
    start = dict(make_model().named_parameters())
    assert torch.equal(ours.model.get_parameter("model.embed_tokens.weight"), start["model.embed_tokens.weight"])


def test_the_object_generates_merges_and_saves_after_training(tmp_path):
    ours = _train(MLXSFTTrainer, tmp_path / "mlx", get_peft_model(make_model(), _lora()))
    inputs = make_tokenizer()("What is 3 plus 3? ", return_tensors="pt")
    with torch.no_grad():
        before = ours.model.eval()(**inputs).logits
        ours.save_model(str(tmp_path / "saved"))
        again = PeftModel.from_pretrained(make_model(), tmp_path / "saved").eval()(**inputs).logits
        merged = ours.model.merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()(**inputs).logits
    assert (again - before).abs().max() == 0
    # Folding the adapter in rounds each weight once.
    assert (whole - before).abs().max() < 1e-5


def test_callbacks_and_metrics_see_trained_weights(tmp_path):
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append(model.get_parameter("lm_head.weight").detach().clone())

    ours = _train(MLXSFTTrainer, tmp_path / "mlx", make_model(), callbacks=[Look()])
    assert len(seen) == 6
    assert torch.equal(seen[-1], ours.model.lm_head.weight)
    # The warmup's first step has a learning rate of zero.
    assert sum(not torch.equal(a, b) for a, b in itertools.pairwise(seen)) == 5


@pytest.mark.usefixtures("uncompiled")
def test_bfloat16_objects_train_in_bfloat16(tmp_path):
    ours = _train(MLXSFTTrainer, tmp_path / "mlx", make_model(dtype=torch.bfloat16))
    theirs = _train(SFTTrainer, tmp_path / "trl", make_model(dtype=torch.bfloat16))
    assert ours.plan.model.precision.dtype == "bfloat16"
    assert {value.dtype for value in ours.model.parameters()} == {torch.bfloat16}
    # Two bfloat16 kernels round differently; a loss of 5.5 has a last place of 0.03.
    assert losses(ours.state.log_history) == pytest.approx(losses(theirs.state.log_history), rel=2e-3)


def _quantised() -> Any:
    model = make_model()
    model.is_loaded_in_4bit = True
    return model


def _adapted() -> Any:
    return get_peft_model(make_model(), _lora())


def _frozen_adapter() -> Any:
    model = get_peft_model(make_model(), _lora())
    for value in model.parameters():
        value.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("make", "keywords", "words"),
    [
        (_quantised, {}, "quantization_config=BitsAndBytesConfig"),
        (_adapted, {"peft_config": _lora()}, "merge_and_unload"),
        (_frozen_adapter, {}, "is_trainable=True"),
        (lambda: torch.nn.Linear(2, 2), {}, "AutoModelForCausalLM"),
        (make_model, {"peft_config": _lora(), "finetune_last_n_layers": 1}, "layers_to_transform=\\[1\\]"),
        (make_model, {"optimizers": (torch.optim.SGD([torch.zeros(1)], 0.1), None)}, "none of trainer.model"),
        (make_model, {"optimizers": (None, object())}, "lr_scheduler = a object"),
        (make_model, {"model_init": make_model}, "model_init\\(\\)"),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_the_line_to_write(make, keywords, words, tmp_path):
    with pytest.raises(SettingError, match=words):
        _train(MLXSFTTrainer, tmp_path, make(), **keywords)


def test_overrides_that_would_never_run_are_refused(tmp_path):
    class Weighted(MLXSFTTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            return 0.0

    with pytest.raises(SettingError, match=r"Weighted\.training_step"):
        _train(Weighted, tmp_path, make_model())


@pytest.mark.parametrize("lora", [True, False])
def test_a_run_on_an_object_resumes_and_ends_the_same(lora, tmp_path):
    def make(folder, **changes):
        model = make_model()
        return MLXSFTTrainer(
            get_peft_model(model, _lora()) if lora else model,
            _arguments(tmp_path / folder, save_strategy="steps", save_steps=3, **changes),
            train_dataset=Dataset.from_list(ROWS),
            processing_class=make_tokenizer(),
        )

    # Each is made before it trains: the order of rows follows torch's generator, which a trainer seeds.
    whole = make("whole")
    whole.train()
    make("parts", max_steps=6).train()
    second = make("parts")
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    pairs = list(zip(whole.model.named_parameters(), second.model.named_parameters(), strict=True))
    assert len(pairs) > 10
    assert all(torch.equal(wanted, found) for (_, wanted), (_, found) in pairs)


def test_the_best_checkpoint_ends_in_the_object(tmp_path):
    model = make_model()
    trainer = MLXSFTTrainer(
        model,
        _arguments(
            tmp_path, learning_rate=0.5, lr_scheduler_type="constant", warmup_steps=0, eval_strategy="steps",
            eval_steps=2, save_strategy="steps", save_steps=2, load_best_model_at_end=True,
        ),
        train_dataset=Dataset.from_list(ROWS),
        eval_dataset=Dataset.from_list(ROWS[:5]),
        processing_class=make_tokenizer(),
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    best = type(model).from_pretrained(trainer.state.best_model_checkpoint, dtype=torch.float32)
    assert torch.equal(model.lm_head.weight, best.lm_head.weight)
