"""What trl's own tests of DPOTrainer ask for, with the class swapped: everything that trains has moved."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from pair_rows import TOOL
from pairs import SILENT, tokenizer
from peft import LoraConfig, get_peft_model
from preference_pairs import load, preference_rows
from swapped_class import assert_the_same_moves, make_models
from test_pair_losses import LOSSES
from trl import DPOConfig, DPOTrainer

from hf_mlx import MLXDPOTrainer


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return make_models(tmp_path_factory.mktemp("models"))


def case(model: Any = "qwen2", rows: Any = None, **settings: Any) -> dict[str, Any]:
    return {"model": model, "rows": rows or preference_rows("text", 9), "settings": settings}


CASES: dict[str, dict[str, Any]] = {
    "qwen2": case(),
    "llama": case("llama"),
    "experts": case("qwen3_moe"),
    "an object": case(lambda folders: load(folders["qwen2"])),
    **{kind: case(rows=preference_rows(kind, 9)) for kind in ("chat", "implicit", "implicit chat")},
    **{loss: case(loss_type=loss, label_smoothing=0.1) for loss in LOSSES},
    "losses": case(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0]),
    "WPO": case(use_weighting=True),
    "LD-DPO": case(ld_alpha=0.5),
    "another divergence": case(f_divergence_type="js_divergence"),
    "kept start": case(max_length=24),
    "kept end": case(max_length=24, truncation_mode="keep_end"),
    "multiples": case(pad_to_multiple_of=8),
    "padding-free": case(padding_free=True),
    "precomputed": case(precompute_ref_log_probs=True),
    "a reference that follows": case(sync_ref_model=True, ref_model_sync_steps=2),
    "half precision": case(model_init_kwargs={"dtype": torch.float16}, learning_rate=1e-3),
    "adapter": case() | {"peft_config": LoraConfig},
    "adapter, precomputed": case(precompute_ref_log_probs=True) | {"peft_config": LoraConfig},
    "adapter on experts": case("qwen3_moe")
    | {"peft_config": lambda: LoraConfig(target_modules=["gate_proj", "up_proj", "down_proj"])},
    "a PeftModel": case(lambda folders: get_peft_model(load(folders["qwen2"]), LoraConfig())),
    "another reference": case() | {"ref_model": lambda folders: load(folders["qwen2"])},
    "checkpointing": case(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}),
    "tools": case(rows=[{**row, "tools": [TOOL]} for row in preference_rows("chat", 9)]),
    "template variables": case(
        rows=[
            {**row, "chat_template_kwargs": {"loud": bool(i % 2)}} for i, row in enumerate(preference_rows("chat", 9))
        ]
    ),
}
FEW = ("adapter", "adapter on experts", "template variables")


def build(cls: type, folders: dict[str, Path], folder: Path, drawn: dict[str, Any], **more: Any) -> Any:
    settings = {**SILENT, "gradient_checkpointing": False, "learning_rate": 1e-2, "logging_steps": 1, "max_steps": 3}
    model: Any = drawn["model"]
    held = model(folders) if isinstance(model, Callable) else str(folders[model])
    if "peft_config" in drawn:
        more["peft_config"] = drawn["peft_config"]()
    if "ref_model" in drawn:
        more["ref_model"] = drawn["ref_model"](folders)
    args = DPOConfig(str(folder / cls.__name__), **{**settings, **drawn["settings"]})
    rows = Dataset.from_list(drawn["rows"])
    return cls(model=held, args=args, train_dataset=rows, processing_class=tokenizer(), **more)


@pytest.mark.parametrize(
    "name", [name if name in FEW else pytest.param(name, marks=pytest.mark.wide) for name in CASES]
)
def test_what_trains_has_moved(folders, tmp_path, name):
    assert_the_same_moves(lambda cls: build(cls, folders, tmp_path, CASES[name]), DPOTrainer, MLXDPOTrainer)


@pytest.mark.parametrize("cls", [DPOTrainer, MLXDPOTrainer])
def test_evaluation_and_its_metrics(folders, tmp_path, cls):
    rows = Dataset.from_list(preference_rows("text", 4, seed=2))
    drawn = case(eval_strategy="steps", eval_steps=3)
    sets: Any = {"data1": rows, "data2": rows}
    with warnings.catch_warnings(action="ignore"):
        trainer = build(cls, folders, tmp_path, drawn, eval_dataset=sets, compute_metrics=lambda _: {"my": 0.5})
        trainer.train()
        log = trainer.state.log_history
        assert log[-3]["eval_data1_loss"] > 0 and log[-2]["eval_data2_loss"] > 0 and log[-2]["eval_data2_my"] == 0.5
    assert {"dpo", "trl"} <= set(trainer.model.model_tags)
