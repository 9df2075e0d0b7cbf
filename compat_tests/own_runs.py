"""Runs with a loss, an optimizer or a schedule of the script's own, beside TRL's: one model, one set of rows."""

from __future__ import annotations

import atexit
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pairs
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import SFTConfig, SFTTrainer

from hf_mlx import MLXSFTTrainer

STEPS = 20
# float32 rounds at 6e-8; twenty steps carry it no further.
CLOSE = 1e-5
# Of what was trained, by one of the two measures below.
CLOSE_WEIGHTS = 1e-6
# A step that goes with the gradient, so that a rounding error of it stays one.
PLAIN = (("optim", "sgd"), ("optim_args", "momentum=0.9"), ("learning_rate", 0.05))
ROWS = pairs.text_rows(40)
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
SETTINGS = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "learning_rate": 2e-3,
    "logging_steps": 1,
    "max_length": 24,
    "eval_strategy": "steps",
    "eval_steps": 10,
    "metric_for_best_model": "loss",
}


@cache
def model_folder() -> Path:
    """The model of every run, made once a process."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return pairs.tiny_model("llama", folder / "base", hidden_size=32, intermediate_size=48)


@dataclass(frozen=True)
class Case:
    """What a script does.

    Attributes:
        lora: An adapter is trained, rather than all weights.
        by_name: The model is named, rather than handed over.
        mixin: Methods that the script's subclass overrides.
        loss: ``compute_loss_func``.
        optimizers: Model -> ``optimizers=``.
        keywords: ``optimizer_cls_and_kwargs`` as pairs.
        settings: Further settings.
    """

    lora: bool
    by_name: bool = True
    mixin: type | None = None
    loss: Callable | None = None
    optimizers: Callable | None = None
    keywords: tuple[tuple[str, Any], ...] = ()
    settings: tuple[tuple[str, Any], ...] = ()

    def asking(self, **settings: Any) -> Case:
        """The same script with other settings."""
        return replace(self, settings=(*self.settings, *settings.items()))


def build(house: type, case: Case, folder: Any, **keywords: Any) -> Any:
    """A trainer of ``house``."""
    cls = house if case.mixin is None else type(case.mixin.__name__, (case.mixin, house), {})
    # Nested pairs stand for dicts, so that a case can be a key.
    for name, (optimizer, options) in case.keywords:
        keywords[name] = (optimizer, dict(options))
    if case.loss is not None:
        keywords["compute_loss_func"] = case.loss
    peft_config = LoraConfig(**LORA) if case.lora else None
    model: Any = str(model_folder())
    if not case.by_name:
        model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    if case.optimizers is not None:
        if case.lora:
            torch.manual_seed(3)
            model, peft_config = get_peft_model(model, peft_config), None
        keywords["optimizers"] = case.optimizers(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cls(
            model,
            SFTConfig(output_dir=str(folder), **{**pairs.SILENT, **SETTINGS, **dict(case.settings)}),
            train_dataset=Dataset.from_list(ROWS),
            eval_dataset=Dataset.from_list(ROWS[:7]),
            processing_class=pairs.tokenizer(),
            peft_config=peft_config,
            **keywords,
        )


@dataclass(frozen=True)
class Ran:
    """What a run left: its log, what it trained by torch's names, and the rate of each group of its optimizer."""

    log: list[dict[str, Any]]
    weights: dict[str, np.ndarray]
    rates: list[float]


def run(house: type, case: Case, folder: Any = None, *, resume: str | None = None, **keywords: Any) -> Ran:
    """A whole run of ``house``."""
    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = build(house, case, folder or temporary, **keywords)
        trainer.train(resume_from_checkpoint=resume)
    named = trainer.model.named_parameters()
    weights = {name: p.detach().numpy().copy() for name, p in named if p.requires_grad}
    return Ran(trainer.state.log_history, weights, [group["lr"] for group in trainer.optimizer.param_groups])


@cache
def theirs(case: Case) -> Ran:
    """TRL's run of a case, made once a process."""
    return run(SFTTrainer, case)


def ours(case: Case, **keywords: Any) -> Ran:
    """Our run of a case."""
    return run(MLXSFTTrainer, case, **keywords)


def same_log(a: list[dict[str, Any]], b: list[dict[str, Any]], *, close: float = CLOSE, leave: Any = ()) -> int:
    """Compare two logs entry by entry and key by key, in their order; gives how many values were compared."""
    compared = 0
    for x, y in zip(a, b, strict=True):
        x, y = pairs._timeless(x), pairs._timeless(y)
        assert list(x) == list(y), (x, y)
        for key, value in x.items():
            if key not in leave:
                assert abs(value - y[key]) <= close * max(abs(value), 1.0), (key, x, y)
                compared += 1
    return compared


def largest_difference(a: Ran, b: Ran) -> float:
    """Of what was trained: the largest difference of a tensor, in parts of its largest number."""
    assert a.weights.keys() == b.weights.keys()
    assert a.weights
    return max(float(np.abs(value - b.weights[name]).max() / np.abs(value).max()) for name, value in a.weights.items())


def relative_norm(a: Ran, b: Ran) -> float:
    """The norm of the difference of all that was trained, in parts of its norm.

    For optimizers that divide each gradient by its own size: where that is a rounding error, its sign is a whole step.
    """
    assert a.weights.keys() == b.weights.keys()
    assert a.weights
    squares = sum(float(np.square(value - b.weights[name]).sum()) for name, value in a.weights.items())
    return (squares / sum(float(np.square(value).sum()) for value in a.weights.values())) ** 0.5
