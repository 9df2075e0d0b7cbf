"""What a script sets on a constructed trainer: the curve is TRL's, or the assignment is refused by name."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pairs
import pytest
from datasets import Dataset
from peft import LoraConfig
from sampling import sampled
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from hf_mlx import MLXSFTTrainer
from hf_mlx.errors import HFMLXError

ROWS = pairs.text_rows(22)
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
SETTINGS = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "max_length": 24,
    "seed": 7,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return pairs.tiny_model("llama", tmp_path_factory.mktemp("live") / "base", hidden_size=32, intermediate_size=48)


def build(cls: type, model: Any, folder: Any, **more: Any) -> Any:
    args = SFTConfig(output_dir=str(folder / cls.__name__), **{**pairs.SILENT, **SETTINGS, **more})
    data = {"train_dataset": Dataset.from_list(ROWS), "eval_dataset": Dataset.from_list(ROWS[:7])}
    return cls(str(model), args, peft_config=LoraConfig(**LORA), **data)


def history(trainer: Any) -> list[dict[str, Any]]:
    return [pairs._timeless(entry) for entry in trainer.state.log_history]


def assert_same_history(theirs: Any, ours: Any) -> int:
    compared = 0
    assert len(history(theirs)) == len(history(ours))
    for a, b in zip(history(theirs), history(ours), strict=True):
        assert a.keys() == b.keys(), (a, b)
        for key, value in a.items():
            assert abs(value - b[key]) <= 2e-4 * max(abs(value), 1e-3), (key, a, b)
            compared += 1
    return compared


def args_of(**fields: Any) -> Any:
    def change(trainer: Any) -> None:
        for name, value in fields.items():
            setattr(trainer.args, name, value)

    return change


def other_args(trainer: Any) -> None:
    # A second SFTConfig would take accelerate's state from under TRL's trainer.
    trainer.args = copy.copy(trainer.args)
    trainer.args.learning_rate, trainer.args.max_steps, trainer.args.logging_steps = 3e-3, 5, 2


def nested(trainer: Any) -> None:
    trainer.args.lr_scheduler_type = "cosine_with_restarts"
    trainer.args.lr_scheduler_kwargs = {"num_cycles": 2}


def wrapped_collator(trainer: Any) -> None:
    inner = trainer.data_collator

    def collator(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = inner(rows)
        batch["labels"][:, :2] = -100
        return batch

    trainer.data_collator = collator


def fewer_rows(trainer: Any) -> None:
    trainer.args.max_steps = -1
    trainer.args.num_train_epochs = 1
    trainer.train_dataset = trainer.train_dataset.select(range(9))


def own_tokens(trainer: Any) -> None:
    rows = [{"input_ids": list(range(5, 9 + i)), "labels": [-100, *range(6, 9 + i)]} for i in range(8)]
    trainer.train_dataset = Dataset.from_list(rows)


def other_eval_rows(trainer: Any) -> None:
    trainer.args.eval_strategy, trainer.args.eval_steps = "steps", 2
    trainer.eval_dataset = trainer.eval_dataset.select(range(5))


def several_eval_sets(trainer: Any) -> None:
    trainer.args.eval_strategy, trainer.args.eval_steps = "steps", 4
    trainer.eval_dataset = {"a": trainer.eval_dataset.select(range(3)), "b": trainer.eval_dataset}


def metrics(trainer: Any) -> None:
    trainer.args.eval_strategy, trainer.args.eval_steps = "steps", 2
    trainer.preprocess_logits_for_metrics = lambda logits, labels: logits.argmax(-1)
    trainer.compute_metrics = lambda seen: {"hits": float((seen.predictions == seen.label_ids).mean())}


def own_callback(trainer: Any) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    trainer.add_callback(Stop())


def own_log(trainer: Any) -> None:
    log = trainer.log
    trainer.log = lambda logs, start_time=None: log({**logs, "mine": 1.0}, start_time)


EQUAL = {
    "learning_rate": args_of(learning_rate=1e-3),
    "max_steps": args_of(max_steps=6),
    "num_train_epochs": args_of(max_steps=-1, num_train_epochs=0.5),
    "gradient_accumulation_steps": args_of(gradient_accumulation_steps=2),
    "per_device_train_batch_size": args_of(per_device_train_batch_size=2),
    "per_device_eval_batch_size": args_of(per_device_eval_batch_size=3, eval_strategy="steps", eval_steps=2),
    "logging_steps": args_of(logging_steps=3, logging_first_step=True),
    "logging_strategy": args_of(logging_strategy="epoch", max_steps=7),
    "eval_strategy": args_of(eval_strategy="epoch", max_steps=7),
    "seed": args_of(seed=123),
    "max_grad_norm": args_of(max_grad_norm=0.05),
    "no clip": args_of(max_grad_norm=0.0),
    "warmup_steps": args_of(warmup_steps=2),
    "scheduler": args_of(lr_scheduler_type="cosine"),
    "scheduler options": nested,
    "weight_decay": args_of(weight_decay=0.5, adam_beta1=0.5),
    "optim": args_of(optim="sgd", optim_args="momentum=0.5"),
    "drop_last": args_of(dataloader_drop_last=True, max_steps=7),
    "sequential": args_of(train_sampling_strategy="sequential"),
    "args": other_args,
    "data_collator": wrapped_collator,
    "train_dataset": fewer_rows,
    "train_dataset of tokens": own_tokens,
    "eval_dataset": other_eval_rows,
    "eval_dataset of names": several_eval_sets,
    "compute_metrics": metrics,
    "add_callback": own_callback,
    "log": own_log,
}


def test_equal_kinds_are_many():
    assert len(EQUAL) == 28


FEW = (
    "learning_rate", "num_train_epochs", "gradient_accumulation_steps", "per_device_eval_batch_size",
    "logging_strategy", "seed", "scheduler options", "optim", "drop_last", "args", "data_collator",
    "train_dataset of tokens", "eval_dataset of names", "compute_metrics", "add_callback", "log",
)  # fmt: skip


@pytest.mark.parametrize("kind", sampled(EQUAL, *FEW))
def test_assignment_gives_trls_curve(kind, model, tmp_path):
    trainers = []
    with pairs._quiet():
        for cls in (SFTTrainer, MLXSFTTrainer):
            trainer = build(cls, model, tmp_path)
            EQUAL[kind](trainer)
            trainer.train()
            trainers.append(trainer)
    assert assert_same_history(*trainers) >= 10


def test_changes_count_at_evaluate_and_at_the_second_train(model, tmp_path):
    trainers = []
    with pairs._quiet():
        for cls in (SFTTrainer, MLXSFTTrainer):
            trainer = build(cls, model, tmp_path)
            trainer.train()
            trainer.args.per_device_eval_batch_size = 2
            metrics = trainer.evaluate()
            trainer.args.max_steps, trainer.args.max_grad_norm = 3, 0.1
            # An optimizer lives on in transformers, with the numbers it was made with.
            trainer.args.learning_rate = trainer.args.weight_decay = 0.5
            trainer.train()
            trainers.append((trainer, metrics))
    (theirs, a), (ours, b) = trainers
    assert a["eval_loss"] == pytest.approx(b["eval_loss"], rel=1e-4)
    assert assert_same_history(theirs, ours) >= 10


def test_output_dir_and_saving(model, tmp_path):
    trainer = build(MLXSFTTrainer, model, tmp_path)
    trainer.args.output_dir = str(tmp_path / "elsewhere")
    trainer.args.save_strategy, trainer.args.save_steps = "steps", 2
    trainer.train()
    assert sorted(path.name for path in (tmp_path / "elsewhere").glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-4",
    ]


LATE = {
    "max_length": 8,
    "packing": True,
    "bf16": True,
    "label_smoothing_factor": 0.1,
    "loss_type": "dft",
    "gradient_checkpointing": False,
    "activation_checkpointing": False,
    "completion_only_loss": True,
    "assistant_only_loss": True,
    "eos_token": "<pad>",
    "pad_to_multiple_of": 8,
    "remove_unused_columns": False,
    "bf16_full_eval": True,
    "push_to_hub": True,
    "dataset_text_field": "other",
}
INVALID = {"learning_rate": -1.0, "max_steps": 0, "optim": "lomo", "logging_steps": -3, "max_grad_norm": "much"}


@pytest.fixture(scope="module")
def built(model, tmp_path_factory):
    return build(MLXSFTTrainer, model, tmp_path_factory.mktemp("refused"))


@pytest.mark.parametrize("field", [*LATE, *INVALID])
def test_setting_that_comes_too_late_is_refused_by_name(field, built):
    before = getattr(built.args, field)
    setattr(built.args, field, (LATE | INVALID)[field])
    try:
        for call in (built.train, built.evaluate):
            with pytest.raises(HFMLXError, match=field):
                call()
    finally:
        setattr(built.args, field, before)


def test_refused_settings_are_many():
    assert len(LATE) + len(INVALID) == 20


def function(*args: Any, **kwargs: Any) -> None: ...


ATTRIBUTES = {
    "model": object(),
    "model_wrapped": object(),
    "optimizer": object(),
    "lr_scheduler": object(),
    "callbacks": [],
    "training_step": function,
    "prediction_step": function,
    "compute_loss_func": "focal",
    "label_smoother": function,
    "floating_point_ops": function,
    "data_collator": None,
    "train_dataset": Dataset.from_list(ROWS),
    "eval_dataset": Dataset.from_list(ROWS),
}


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attribute_that_nothing_would_read_is_refused_on_assignment(name, built):
    before = getattr(built, name, None)
    with pytest.raises(HFMLXError, match=name):
        setattr(built, name, ATTRIBUTES[name])
    if name != "data_collator":
        assert getattr(built, name, None) == before


def test_every_method_of_trls_trainer_is_here_or_refused(built):
    names = [n for n in dir(SFTTrainer) if not n.startswith("__") and callable(getattr(SFTTrainer, n))]
    missing = [n for n in names if not hasattr(type(built), n)]
    for name in missing:
        with pytest.raises(HFMLXError, match=name):
            setattr(built, name, function)
    assert len(missing) >= 35


def test_said_once(built, caplog):
    built.args.seed, built.args.lerning_rate = 8, 1
    with caplog.at_level(logging.WARNING):
        built.evaluate()
        built.evaluate()
    told = [r.message for r in caplog.records if "seed=8" in r.message or "lerning_rate" in r.message]
    assert len(told) == 2
    assert any("learning_rate" in line for line in told)


def test_names_that_scripts_read(model, tmp_path):
    names = ["is_deepspeed_enabled", "is_fsdp_enabled", "is_model_parallel", "can_return_loss", "label_names"]
    theirs, ours = (build(cls, model, tmp_path) for cls in (SFTTrainer, MLXSFTTrainer))
    for name in [*names, "optimizer", "lr_scheduler"]:
        assert getattr(theirs, name) == getattr(ours, name), name
    assert ours.model_wrapped is ours.model
    assert theirs.get_num_trainable_parameters() == ours.get_num_trainable_parameters()
    assert theirs.get_total_train_batch_size(theirs.args) == ours.get_total_train_batch_size(ours.args) == 4


def test_method_set_before_the_constructor_is_refused(model, tmp_path):
    class Own(MLXSFTTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.training_step = function
            super().__init__(*args, **kwargs)

    with pytest.raises(HFMLXError, match="training_step"):
        build(Own, model, tmp_path)
