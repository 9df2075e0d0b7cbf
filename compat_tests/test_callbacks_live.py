"""What callbacks get in hand, beside TRL: optimizer, scheduler, gradients, modules; by name and as an object."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pairs
import pytest
import transformers
import yaml
from datasets import Dataset
from own_runs import model_folder
from peft import LoraConfig
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from hf_mlx import MLXSFTTrainer
from hf_mlx.errors import HFMLXError

ROWS = pairs.text_rows(14)
SETTINGS = {"max_steps": 5, "per_device_train_batch_size": 4, "logging_steps": 1, "learning_rate": 1e-2}
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture
def model():
    return model_folder()


def build(
    cls: type, model: Any, folder: Any, *, callback: Any = None, lora: bool = False, as_object: bool, **more: Any
):
    args = SFTConfig(output_dir=str(folder / cls.__name__), **{**pairs.SILENT, **SETTINGS, **more})
    held = transformers.AutoModelForCausalLM.from_pretrained(model) if as_object else str(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    return cls(
        held,
        args,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
        callbacks=[callback] if callback else None,
        peft_config=LoraConfig(**LORA) if lora else None,
    )


def run_both(make: Any, model: Any, folder: Any, **options: Any) -> tuple[list[Any], list[Any]]:
    callbacks, histories = [], []
    for cls in (SFTTrainer, MLXSFTTrainer):
        callback = make()
        with pairs._quiet():
            trainer = build(cls, model, folder, callback=callback, **options)
            trainer.train()
        callbacks.append(callback)
        histories.append(pairs.untimed(trainer.state.log_history))
    pairs.assert_same_log(*histories, relative=3e-4)
    return callbacks, histories


EVENTS = ("on_train_begin", "on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end", "on_log")


class Reads(TrainerCallback):
    """Writes down what the optimizer and the scheduler say in each event."""

    def __init__(self) -> None:
        self.seen: list[Any] = []


def _read(event: str) -> Any:
    def read(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
        groups = [
            {k: v for k, v in g.items() if k in ("lr", "weight_decay", "betas", "eps")} for g in optimizer.param_groups
        ]
        counts = [len(group["params"]) for group in optimizer.param_groups]
        self.seen.append((event, groups, counts, lr_scheduler.get_last_lr(), lr_scheduler.last_epoch))

    return read


for _event in EVENTS:
    setattr(Reads, _event, _read(_event))


@pytest.mark.parametrize("as_object", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_groups_and_rates_read_as_theirs(lora, as_object, model, tmp_path):
    options = {"lora": lora, "weight_decay": 0.1, "warmup_steps": 2, "max_steps": 4}
    (theirs, ours), _ = run_both(Reads, model, tmp_path, as_object=as_object, **options)
    assert len(theirs.seen) == 1 + 5 * 4 + 1
    for a, b in zip(theirs.seen, ours.seen, strict=True):
        assert a[0] == b[0]
        for one, two in zip(a[1], b[1], strict=True):
            assert two.pop("betas") == one.pop("betas")
            assert two == pytest.approx(one), (a, b)
        assert (a[2], a[4]) == (b[2], b[4])
        assert a[3] == pytest.approx(b[3])


def set_rate(self, args, state, control, optimizer=None, **kwargs):
    if state.global_step in (1, 3):
        for group in optimizer.param_groups:
            group["lr"] = 0.05


@pytest.mark.parametrize("event", ["on_step_begin", "on_pre_optimizer_step", "on_step_end"])
def test_rate_that_is_set_takes_effect(event, model, tmp_path):
    def make() -> TrainerCallback:
        return type("Sets", (TrainerCallback,), {event: set_rate})()

    _, (theirs, _) = run_both(make, model, tmp_path, as_object=False)
    assert [round(entry["learning_rate"], 4) for entry in theirs[:5]] == [0.01, 0.008, 0.006, 0.004, 0.002]


def test_changes_that_the_step_cannot_make_are_refused(model, tmp_path):
    changes = {"weight_decay": 0.5, "betas": (0.5, 0.9), "lr": 1.0}
    for name, value in changes.items():

        class Changes(TrainerCallback):
            def on_step_begin(self, args, state, control, optimizer=None, name=name, value=value, **kwargs):
                optimizer.param_groups[0][name] = value

        with pairs._quiet():
            trainer = build(MLXSFTTrainer, model, tmp_path, callback=Changes(), as_object=False)
            with pytest.raises(HFMLXError, match=r"param_groups[\s\S]*create_optimizer\("):
                trainer.train()


@pytest.mark.parametrize("as_object", [False, True])
def test_methods_that_train_makes_are_refused(as_object, model, tmp_path):
    with pairs._quiet():
        trainer = build(MLXSFTTrainer, model, tmp_path, as_object=as_object, max_steps=1)
        trainer.train()
    for call in (
        trainer.optimizer.step,
        trainer.optimizer.zero_grad,
        trainer.optimizer.state_dict,
        trainer.lr_scheduler.step,
    ):
        with pytest.raises(HFMLXError, match=r"optimizer\.|lr_scheduler\."):
            call()
    assert trainer.get_learning_rates() == [0.0, 0.0]
    assert [len(group) for group in trainer.get_optimizer_group()] == [16, 5]
    group = trainer.optimizer.param_groups[1]
    assert {tuple(value.shape) for value in group["params"]} == {(32,)}


class Cards(TrainerCallback):
    """Looks for the card whenever a checkpoint is there."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, bool]] = []

    def on_save(self, args, state, control, **kwargs):
        self.seen.append((state.global_step, (Path(args.output_dir) / "README.md").is_file()))


def test_card_is_there_with_each_checkpoint(model, tmp_path):
    (theirs, ours), _ = run_both(Cards, model, tmp_path, as_object=False, save_strategy="steps", save_steps=2)
    assert theirs.seen == ours.seen == [(2, True), (4, True), (5, True)]
    cards = [(tmp_path / cls.__name__ / "README.md").read_text() for cls in (SFTTrainer, MLXSFTTrainer)]
    fronts = [yaml.safe_load(card.split("---")[1]) for card in cards]
    assert fronts[0].keys() - {"licence", "license"} <= fronts[1].keys()
    assert fronts[0]["model_name"] == "SFTTrainer" and fronts[1]["model_name"] == "MLXSFTTrainer"
    assert set(fronts[0]["tags"]) <= set(fronts[1]["tags"])


class Norms(TrainerCallback):
    """Writes down the gradients before the update."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        self.seen.append({name: grad.clone() for name, grad in named.items()})


@pytest.mark.parametrize("as_object", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_gradients_before_the_update_are_theirs(lora, as_object, model, tmp_path):
    # At a small rate, so that the weights are the same to the last digits in each step.
    more = {"gradient_accumulation_steps": 2, "max_steps": 3, "learning_rate": 1e-4}
    (theirs, ours), _ = run_both(Norms, model, tmp_path, as_object=as_object, lora=lora, **more)
    compared = 0
    for a, b in zip(theirs.seen, ours.seen, strict=True):
        assert a.keys() == b.keys()
        for name, grad in a.items():
            assert (grad - b[name]).abs().max() <= 1e-4 * max(grad.abs().max().item(), 1e-3), name
            compared += 1
    assert compared == 3 * (8 if lora else 21)


class Scales(TrainerCallback):
    """Zeroes some gradients and halves others."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        for name, p in model.named_parameters():
            if p.grad is not None and "q_proj" in name:
                p.grad.zero_()
            elif p.grad is not None:
                p.grad.mul_(0.5)


@pytest.mark.parametrize("as_object", [False, True])
def test_gradients_that_are_written_take_effect(as_object, model, tmp_path):
    run_both(Scales, model, tmp_path, as_object=as_object, optim="sgd", max_steps=4)
