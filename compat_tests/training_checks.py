"""Three steps of LoRA on a tiny model of any type: here, in trl, and what torch with PEFT makes of our export."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from architecture_zoo import make_model
from datasets import Dataset
from pairs import SILENT, rows_of, tokenizer
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from hf_mlx import MLXSFTTrainer

SETTINGS: dict[str, Any] = {
    **SILENT,
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "max_length": 32,
    "seed": 3,
    "gradient_checkpointing": False,
    "router_aux_loss_coef": 0.0,
}
ROWS, HELD_OUT = rows_of("text", 4), rows_of("text", 3, seed=9)

# trl 1.16 looks for the hidden states where Llama 4's base_model_prefix points, which is at logits: it cannot train
# these, so transformers' own Trainer stands in, on the same collated batches.
BEYOND_TRL = ("llama4", "llama4_text")

# What "all-linear" reaches and PEFT itself does not train: it refuses Mamba's out_proj, Llama 4's router fails in it,
# and laguna's shared experts get lost when it loads its own adapter.
EXCLUDED: dict[str, Any] = {
    "falcon_mamba": ["out_proj"],
    "laguna": r".*shared_experts.*",
    "llama4": ["router"],
    "llama4_text": ["router"],
    "mamba": ["out_proj"],
    "mamba2": ["out_proj"],
    "nemotron_h": ["out_proj"],
}


@dataclass(frozen=True)
class Training:
    """One model type in training; differences are relative.

    Attributes:
        loss, grad_norm: Largest difference of the three steps from trl's.
        evaluation: Our eval loss against trl's with PEFT on torch, on our export.
        keys: Tensors in the adapter.
        other_keys: Tensors that are in one of the two exports only.
        moved: The largest value of the lora_B that moved least, among those that trl moved; 0 would prove nothing.
        excluded: ``exclude_modules``; empty where all is adapted.
        peer: Who was trained beside.
    """

    loss: float
    grad_norm: float
    evaluation: float
    keys: int
    other_keys: tuple[str, ...]
    moved: float
    excluded: str
    peer: str


def lora_for(model_type: str) -> dict[str, Any]:
    """``all-linear``, without what PEFT does not train."""
    excluded = {"exclude_modules": EXCLUDED[model_type]} if model_type in EXCLUDED else {}
    return {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **excluded}


def make_base(model_type: str, folder: Path, **changes: Any) -> Path:
    """A tiny model over the byte-level vocabulary, saved by transformers with its tokenizer."""
    sizes = {"vocab_size": len(tokenizer())}
    if model_type.startswith("gemma4"):
        sizes["vocab_size_per_layer_input"] = len(tokenizer())
    with quiet():
        make_model(model_type, **sizes, **changes).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
    return folder


def train_mlx(
    base: Path, output: Path, lora: dict[str, Any] | None, *, resume: str | None = None, **options: Any
) -> MLXSFTTrainer:
    """Our trainer after three steps, with what it saved in ``output``."""
    with quiet():
        trainer = MLXSFTTrainer(
            str(base),
            SFTConfig(output_dir=str(output / "run"), **{**SETTINGS, **options.pop("settings", {})}),
            train_dataset=options.pop("train_dataset", Dataset.from_list(ROWS)),
            eval_dataset=Dataset.from_list(HELD_OUT),
            processing_class=transformers.AutoTokenizer.from_pretrained(base),
            peft_config=LoraConfig(**lora) if lora else None,
            **options,
        )
        trainer.train(resume)
        trainer.save_model(str(output))
    return trainer


def compare_training(model_type: str, folder: Path) -> Training:
    """Trains on both sides from one saved folder and compares curves, key sets and the export's eval loss."""
    base, lora = make_base(model_type, folder / "base"), lora_for(model_type)
    ours = train_mlx(base, folder / "ours", lora)
    train = _train_transformers if model_type in BEYOND_TRL else _train_trl
    with quiet():
        history = train(base, folder / "theirs", lora, ours)
        evaluated = ours.evaluate()["eval_loss"]
        theirs = evaluate_torch(base, folder / "ours", ours, plain=model_type in BEYOND_TRL)
    loss, grad_norm = _curve_differences(ours.state.log_history, history)
    excluded = EXCLUDED.get(model_type, "")
    saved = [adapter_keys(folder / name) for name in ("ours", "theirs")]
    return Training(
        loss=loss,
        grad_norm=grad_norm,
        evaluation=_relative(evaluated, theirs),
        keys=len(saved[0]),
        other_keys=tuple(sorted(saved[0] ^ saved[1])),
        moved=_least_moved(folder),
        excluded=", ".join(excluded) if isinstance(excluded, list) else excluded.strip(".*"),
        peer="transformers" if model_type in BEYOND_TRL else "trl",
    )


def compare_full(model_type: str, folder: Path, **changes: Any) -> tuple[float, float, MLXSFTTrainer]:
    """Trains all weights on both sides; gives the largest relative differences of loss and gradient norm."""
    base = make_base(model_type, folder / "base", **changes)
    ours = train_mlx(base, folder / "ours", None)
    with quiet():
        history = _train_trl(base, folder / "theirs", None, ours)
    return *_curve_differences(ours.state.log_history, history), ours


def _curve_differences(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> tuple[float, float]:
    curves = [[(entry["loss"], entry["grad_norm"]) for entry in run if "loss" in entry] for run in (ours, theirs)]
    assert len(curves[0]) == len(curves[1]) == SETTINGS["max_steps"]
    pairs = list(zip(*curves, strict=True))
    return tuple(max(_relative(a[i], b[i]) for a, b in pairs) for i in (0, 1))  # pyright: ignore[reportReturnType]


def evaluate_torch(base: Path, adapter: Path, ours: MLXSFTTrainer, *, plain: bool = False) -> float:
    """The eval loss of base + adapter in torch and PEFT, by trl (or, ``plain``, by the model's own forward)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        model = peft.PeftModel.from_pretrained(load_class(base).from_pretrained(base), adapter).eval()
    if plain:
        batch = _collator()([dict(row) for row in ours.eval_dataset])
        with torch.no_grad():
            return model(**batch).loss.item()
    trainer = SFTTrainer(
        model,
        SFTConfig(output_dir=str(adapter / "evaluated"), **SETTINGS),
        train_dataset=Dataset.from_list(ROWS),
        eval_dataset=Dataset.from_list(HELD_OUT),
        processing_class=transformers.AutoTokenizer.from_pretrained(base),
    )
    return trainer.evaluate()["eval_loss"]


def load_class(base: Path) -> Any:
    """The class that trl builds: the first of ``architectures`` (a multimodal type is more than its causal LM)."""
    return getattr(transformers, json.loads((base / "config.json").read_text())["architectures"][0])


def adapter_keys(folder: Path) -> set[str]:
    """Tensor names of a saved adapter."""
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return set(file.keys())


def _least_moved(folder: Path) -> float:
    ours, theirs = (load_file(folder / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    moved = [name for name, value in theirs.items() if "lora_B" in name and value.any()]
    return min(float(ours[name].abs().max()) for name in moved)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and advice of three libraries."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


def _train_trl(base: Path, output: Path, lora: dict[str, Any] | None, ours: MLXSFTTrainer) -> list[dict[str, float]]:
    trainer = SFTTrainer(
        str(base),
        SFTConfig(output_dir=str(output / "run"), **SETTINGS),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=transformers.AutoTokenizer.from_pretrained(base),
        peft_config=LoraConfig(**lora) if lora else None,
    )
    trainer.train()
    trainer.save_model(str(output))
    return trainer.state.log_history


def _train_transformers(base: Path, output: Path, lora: dict[str, Any], ours: MLXSFTTrainer) -> list[dict[str, float]]:
    transformers.set_seed(SETTINGS["seed"])
    model = peft.get_peft_model(load_class(base).from_pretrained(base), LoraConfig(**lora))
    known = {k: v for k, v in SETTINGS.items() if k not in ("max_length", "router_aux_loss_coef")}
    with tempfile.TemporaryDirectory() as scratch:
        trainer = transformers.Trainer(
            model,
            transformers.TrainingArguments(output_dir=scratch, **known),
            data_collator=_collator(),
            train_dataset=ours.train_dataset,
        )
        trainer.train()
    model.save_pretrained(output)
    return trainer.state.log_history


def _collator() -> DataCollatorForLanguageModeling:
    return DataCollatorForLanguageModeling(pad_token_id=tokenizer().pad_token_id)


def _relative(ours: float, theirs: float) -> float:
    return abs(ours - theirs) / abs(theirs)
