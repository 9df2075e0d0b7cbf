"""Weights that a callback writes: the next step starts from them, as in TRL."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from dropin_models import ROWS, losses, make_model, make_tokenizer, write_model
from peft import get_peft_model
from sampling import sampled
from test_objects_changed import LOSS, _arguments, _lora
from transformers import TrainerCallback
from trl import SFTTrainer

from hf_mlx import MLXSFTTrainer
from hf_mlx.errors import HFMLXError


def _halve_no_grad(model: Any) -> None:
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.mul_(0.5)


def _data_copy(model: Any) -> None:
    for _, value in model.named_parameters():
        if value.requires_grad:
            value.data.copy_(0.9 * value.data)


def _one_row(model: Any) -> None:
    name = next(name for name, value in model.named_parameters() if value.requires_grad)
    model.get_parameter(name).data[1] = 0.25


def _load(model: Any) -> None:
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    state = {name: 0.5 * value for name, value in model.state_dict().items() if name in trained}
    model.load_state_dict(state, strict=False)


def _listed(model: Any) -> None:
    for value in list(model.parameters()):
        if value.requires_grad:
            value.data *= 0.75


WRITES: dict[str, Callable[[Any], None]] = {
    "no_grad": _halve_no_grad, "data.copy_": _data_copy, "data[...]": _one_row, "load_state_dict": _load,
    "list": _listed,
}  # fmt: skip
EVENTS = ("on_train_begin", "on_epoch_begin", "on_step_begin", "on_step_end", "on_log", "on_evaluate", "on_epoch_end")
KINDS = ("full object", "PeftModel", "peft_config on a name")


def _callback(event: str, write: Callable[[Any], None]) -> TrainerCallback:
    def method(self, args, state, control, model=None, **kwargs):
        write(model)

    return type("Writes", (TrainerCallback,), {event: method})()


def _run(trainer: type, kind: str, folder: Any, callback: Any, **changes: Any) -> Any:
    model: Any = str(write_model(folder / "base")) if "name" in kind else make_model()
    if kind == "PeftModel":
        torch.manual_seed(3)
        model = get_peft_model(model, _lora(init_lora_weights=False))
    settings = dict(
        max_steps=-1, num_train_epochs=2, gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=2
    )
    made = trainer(
        model,
        _arguments(folder / "run", **settings | changes),
        train_dataset=Dataset.from_list(ROWS[:8]),
        eval_dataset=Dataset.from_list(ROWS[:3]),
        processing_class=make_tokenizer(),
        peft_config=_lora() if "name" in kind else None,
        callbacks=[callback],
    )
    made.train()
    return made


CASES = [(event, list(WRITES)[i % len(WRITES)], kind) for i, event in enumerate(EVENTS) for kind in KINDS]
CASES += [("on_step_end", write, kind) for write in WRITES for kind in KINDS]


# Every event, every way of writing and every kind of model.
FEW = [
    case for i, case in enumerate(CASES[: len(EVENTS) * len(KINDS)]) if i % len(KINDS) == i // len(KINDS) % len(KINDS)
]


@pytest.mark.parametrize(("event", "write", "kind"), sampled(sorted(set(CASES)), *FEW))
def test_what_a_callback_writes_is_trained_on(event, write, kind, tmp_path):
    theirs = _run(SFTTrainer, kind, tmp_path / "trl", _callback(event, WRITES[write]))
    ours = _run(MLXSFTTrainer, kind, tmp_path / "mlx", _callback(event, WRITES[write]))
    expected, found = losses(theirs.state.log_history), losses(ours.state.log_history)
    assert len(found) == 4
    assert found == pytest.approx(expected, rel=LOSS)
    evaluated = [[e["eval_loss"] for e in t.state.log_history if "eval_loss" in e] for t in (theirs, ours)]
    assert len(evaluated[1]) == 2
    assert evaluated[1] == pytest.approx(evaluated[0], rel=LOSS)


def test_how_many_writes_were_tried():
    assert len(set(CASES)) >= 30
    assert [set(seen) for seen in zip(*FEW, strict=True)] == [set(EVENTS), set(WRITES), set(KINDS)]


def _freeze(model: Any) -> None:
    next(value for value in model.parameters() if value.requires_grad).requires_grad_(False)


def _write_frozen(model: Any) -> None:
    next(value for value in model.parameters() if not value.requires_grad).data.mul_(0.5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("event", "write", "words"),
    [
        ("on_step_end", _freeze, "requires_grad=False set on .* in on_step_end"),
        ("on_pre_optimizer_step", _halve_no_grad, "written in on_pre_optimizer_step"),
        ("on_substep_end", _halve_no_grad, "written in on_substep_end"),
        ("on_step_begin", _write_frozen, "not trained, written in on_step_begin"),
    ],
)
def test_what_the_run_cannot_go_on_from_is_refused(kind, event, write, words, tmp_path):
    # Of a model that is trained in full nothing is frozen.
    if write is _write_frozen and kind == "full object":
        kind = "PeftModel"
    with pytest.raises(HFMLXError, match=words):
        _run(MLXSFTTrainer, kind, tmp_path, _callback(event, write))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_written_between_constructor_and_train_are_trained_on(kind, tmp_path):
    def run(trainer: type, folder: Any) -> list[float]:
        model: Any = str(write_model(folder / "base")) if "name" in kind else make_model()
        if kind == "PeftModel":
            torch.manual_seed(3)
            model = get_peft_model(model, _lora(init_lora_weights=False))
        made = trainer(
            model, _arguments(folder / "run"), train_dataset=Dataset.from_list(ROWS),
            processing_class=make_tokenizer(), peft_config=_lora() if "name" in kind else None,
        )  # fmt: skip
        _listed(made.model)
        made.train()
        return losses(made.state.log_history)

    expected, found = run(SFTTrainer, tmp_path / "trl"), run(MLXSFTTrainer, tmp_path / "mlx")
    assert len(found) == 3
    assert found == pytest.approx(expected, rel=LOSS)
