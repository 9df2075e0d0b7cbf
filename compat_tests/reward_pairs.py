"""Two runs of one reward-model script: trl.RewardTrainer on torch's CPU and MLXRewardTrainer."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from pairs import SILENT, _quiet, untimed
from peft import LoraConfig, get_peft_model
from preference_pairs import preference_rows
from trl import RewardConfig, RewardTrainer

from hf_mlx import MLXRewardTrainer

FORMATS = ("text", "chat", "implicit", "implicit chat")
# How the model comes in, and what is trained.
MODELS = (
    "name",
    "name, full",
    "object",
    "object, full",
    "peft model",
    "folder with a score",
    "folder with a score, full",
)


def reward_rows(kind: str, count: int, seed: int = 0, *, margin: bool = False) -> list[dict[str, Any]]:
    """``count`` rows of uneven length."""
    rows = preference_rows(kind, count, seed)
    return [{**row, "margin": (at % 5 - 2) / 4} for at, row in enumerate(rows)] if margin else rows


def load(folder: Path, seed: int = 3) -> Any:
    """The folder's model with a score of its own."""
    torch.manual_seed(seed)
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)


def with_score(folder: Path, seed: int = 3) -> Path:
    """A folder beside ``folder`` that holds a score."""
    made = folder.parent / f"{folder.name}-score"
    if not made.exists():
        load(folder, seed).save_pretrained(made)
        transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(made)
    return made


def arguments(folder: Path, model: str, lora: dict[str, Any]) -> dict[str, Any]:
    """``model`` and ``peft_config`` of a constructor, made afresh."""
    given: dict[str, Any] = {"model": str(folder), "peft_config": None if "full" in model else LoraConfig(**lora)}
    if model.startswith("object"):
        given["model"] = load(folder)
    if model.startswith("folder"):
        given["model"] = str(with_score(folder))
    if model == "peft model":
        torch.manual_seed(5)
        adapted = get_peft_model(load(folder), LoraConfig(**lora))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter += 0.1 * torch.randn_like(parameter)
        given |= {"model": adapted, "peft_config": None}
    return given


def run(
    cls: type,
    folder: Path,
    settings: dict[str, Any],
    rows: Any,
    model: str,
    lora: dict[str, Any],
    *,
    then: Callable[[Any], Any] = lambda trainer: None,
    **more: Any,
):
    """One run; the trainer, trained, with ``found``: what ``then`` made of it."""
    with _quiet() as output, warnings.catch_warnings():
        # PEFT and transformers on modules that are copied beside the base.
        warnings.simplefilter("ignore")
        settings = {**SILENT, "logging_steps": 1, **settings}
        trainer = cls(
            **arguments(folder, model, copy.deepcopy(lora)),
            args=RewardConfig(**{"output_dir": output, **settings}),
            train_dataset=Dataset.from_list(rows) if isinstance(rows, list) else rows,
            **more,
        )
        trainer.train()
        trainer.found = then(trainer)
    return trainer


def run_both(folder: Path, settings: dict[str, Any], rows: Any, model: str, lora: dict[str, Any], **more: Any):
    """TRL's trainer and ours, trained."""
    return tuple(run(cls, folder, settings, rows, model, lora, **more) for cls in (RewardTrainer, MLXRewardTrainer))


def assert_same_log(theirs: Any, ours: Any, **options: Any) -> int:
    """:func:`assert_same_entries` of two trainers, trained."""
    return assert_same_entries(theirs.state.log_history, ours.state.log_history, **options)


def assert_same_entries(
    theirs: list[dict[str, Any]], ours: list[dict[str, Any]], *, relative: float, loss: float
) -> int:
    """Every entry: the same keys in the same order, and the same values. Returns how many were compared.

    Args:
        theirs, ours: Logs.
        relative: Largest relative difference of a logged value.
        loss: Largest relative difference of the loss.
    """
    compared = 0
    theirs, ours = untimed(theirs), untimed(ours)
    assert len(theirs) == len(ours)
    for a, b in zip(theirs, ours, strict=True):
        assert list(a) == list(b)
        # Means and margins are differences of rewards, whose rounding they have.
        rewards = max([0.0, *(abs(value) for key, value in a.items() if key.endswith(("min_reward", "max_reward")))])
        for key, value in a.items():
            scale = rewards if key.endswith(("reward", "margin")) else 1e-3
            difference = abs(value - b[key]) / max(abs(value), scale)
            limit = loss if key.endswith("loss") else relative
            assert difference <= limit, f"{a['step']}: {key} is {b[key]!r}, TRL has {value!r} ({difference:.1e})"
            compared += 1
    return compared
