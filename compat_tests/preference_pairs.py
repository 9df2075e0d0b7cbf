"""Two runs of one preference script: trl.DPOTrainer on torch's CPU and MLXDPOTrainer."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from pairs import SILENT, _quiet, text_rows, untimed
from peft import LoraConfig, get_peft_model
from trl import DPOConfig, DPOTrainer

from hf_mlx import MLXDPOTrainer

FORMATS = ("text", "chat", "implicit", "implicit chat")
# How the reference comes about, and what is trained.
REFERENCES = ("adapter off", "peft model", "other model", "other model, full", "full", "object, full", "precomputed",
              "precomputed, full")  # fmt: skip
# The margin of a reward is the difference of two sums of hundreds of tokens' log-probabilities.
SCALED = ("rewards/chosen", "rewards/rejected", "rewards/margins")


def preference_rows(kind: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """``count`` rows of uneven length."""
    texts = [row["text"] for row in text_rows(3 * count, seed)]
    rows = [
        {"prompt": a + "\n", "chosen": b, "rejected": c}
        for a, b, c in zip(texts[:count], texts[count : 2 * count], texts[2 * count :], strict=True)
    ]
    if "chat" in kind:
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        rows = [{k: [{"role": roles[k], "content": v}] for k, v in row.items()} for row in rows]
    if "implicit" in kind:
        rows = [{k: row["prompt"] + row[k] for k in ("chosen", "rejected")} for row in rows]
    return rows


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def other(folder: Path) -> Any:
    """A model of the same architecture with other weights."""
    model = load(folder)
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    return model


def arguments(folder: Path, reference: str, lora: dict[str, Any]) -> dict[str, Any]:
    """``model``, ``ref_model`` and ``peft_config`` of a constructor, made afresh."""
    full = "full" in reference
    given: dict[str, Any] = {"model": str(folder), "peft_config": None if full else LoraConfig(**lora)}
    if reference == "peft model":
        torch.manual_seed(5)
        model = get_peft_model(load(folder), LoraConfig(**lora))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter += 0.1 * torch.randn_like(parameter)
        given |= {"model": model, "peft_config": None}
    if reference.startswith("other model"):
        given["ref_model"] = other(folder)
    if reference.startswith("object"):
        given["model"] = load(folder)
    return given


def run(
    cls: type, folder: Path, settings: dict[str, Any], rows: Any, reference: str, lora: dict[str, Any], **more: Any
):
    """One run; the trainer, trained."""
    with _quiet() as output:
        settings = {**SILENT, "logging_steps": 1, **settings}
        settings["precompute_ref_log_probs"] = reference.startswith("precomputed")
        trainer = cls(
            **arguments(folder, reference, copy.deepcopy(lora)),
            args=DPOConfig(**{"output_dir": output, **settings}),
            train_dataset=Dataset.from_list(rows) if isinstance(rows, list) else rows,
            **more,
        )
        trainer.train()
    return trainer


def run_both(folder: Path, settings: dict[str, Any], rows: Any, reference: str, lora: dict[str, Any], **more: Any):
    """TRL's trainer and ours, trained."""
    return tuple(run(cls, folder, settings, rows, reference, lora, **more) for cls in (DPOTrainer, MLXDPOTrainer))


def assert_same_log(theirs: Any, ours: Any, **options: Any) -> int:
    """:func:`assert_same_entries` of two trainers, trained."""
    return assert_same_entries(theirs.state.log_history, ours.state.log_history, **options)


def assert_same_entries(
    theirs: list[dict[str, Any]],
    ours: list[dict[str, Any]],
    *,
    relative: float,
    beta: float = 0.1,
    reference: str = "",
    loss: float | None = None,
    left_out: tuple[str, ...] = (),
) -> int:
    """Every entry: the same keys in the same order, and the same values. Returns how many were compared.

    Args:
        theirs, ours: Logs.
        relative: Largest difference of a logged value, relative to it or to what it is a difference of: a tenth of beta
            times the log-probabilities for rewards, the spread of logits for their mean; and 1e-3 for all else.
        beta: Of the run; rewards have its scale.
        reference: Of :data:`REFERENCES`.
        loss: Largest difference of the loss, beside that.
        left_out: Keys whose values are not compared.
    """
    compared, moved = 0, False
    theirs, ours = untimed(theirs), untimed(ours)
    assert len(theirs) == len(ours)
    for a, b in zip(theirs, ours, strict=True):
        assert list(a) == list(b)
        logps = max([1.0, *(abs(value) for key, value in a.items() if "logps/" in key)])
        for key, value in ((key, value) for key, value in a.items() if key not in left_out):
            if key.endswith("rewards/accuracies"):
                margin = max(abs(each[key.replace("accuracies", "margins")]) for each in (a, b))
                near = margin <= 1e-5 * beta * logps
                # The policy is still its reference, but the latter's numbers come from batches of other shapes: the
                # margins are rounding alone, whose sign this is.
                assert near or moved or "precomputed" not in reference
                if near and (moved or "precomputed" in reference):
                    continue
            # The mean of logits of either sign has the rounding of their spread, which is 0.4 in these models.
            scale = beta * logps * 0.1 if key.endswith(SCALED) else 0.1 if "logits/" in key else 1e-3
            if math.isnan(value) and math.isnan(b[key]):
                # A rate that the losses do not bear: both sides have left the numbers at the same step.
                continue
            difference = abs(value - b[key]) / max(abs(value), scale)
            said = f"step {a['step']}: {key} is {b[key]!r}, TRL has {value!r} ({difference:.1e})"
            assert difference <= relative, said
            if loss is not None and key in ("loss", "eval_loss", "train_loss"):
                # Below its start a loss falls as fast as the rounding of log-ratios stays.
                assert abs(value - b[key]) <= loss * max(abs(value), math.log(2)), said
            compared += 1
        moved = moved or a.get("learning_rate", 0.0) > 0
    return compared
