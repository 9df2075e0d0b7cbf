"""What trl's own tests of RewardTrainer ask for, with the class swapped: everything that trains has moved."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from pair_rows import CHAT, TOOL
from pairs import SILENT, tokenizer
from peft import LoraConfig, get_peft_model
from reward_pairs import load, reward_rows, with_score
from swapped_class import assert_the_same_moves, make_models
from trl import RewardConfig, RewardTrainer

from hf_mlx import HFMLXError, MLXRewardTrainer

TEMPLATE = "{% for m in messages %}{{ (m.role | upper if loud else m.role) + ': ' + m.content + '\n' }}{% endfor %}"
TOKENS = [{"chosen_ids": [3 + i, 9, 40], "rejected_ids": [5, 60 + i]} for i in range(8)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    (root / "chat.jinja").write_text(TEMPLATE)
    return make_models(root) | {"template": root / "chat.jinja"}


def case(model: Any = "qwen2", rows: Any = None, **settings: Any) -> dict[str, Any]:
    return {"model": model, "rows": rows or reward_rows("implicit", 9), "settings": settings}


def a_peft_model(folders: dict[str, Path]) -> Any:
    return get_peft_model(load(folders["qwen2"]), LoraConfig())


CASES: dict[str, dict[str, Any]] = {
    "qwen2": case(),
    "llama": case("llama"),
    "experts": case("qwen3_moe"),
    **{kind: case(rows=reward_rows(kind, 9)) for kind in ("text", "chat", "implicit chat")},
    "an object": case(lambda folders: load(folders["qwen2"])),
    "a folder with a score": case(lambda folders: str(with_score(folders["qwen2"]))),
    "half precision": case(model_init_kwargs={"dtype": torch.float16}, learning_rate=1e-3),
    "adapter": case() | {"peft_config": LoraConfig},
    "adapter on experts": case("qwen3_moe")
    | {"peft_config": lambda: LoraConfig(target_modules=["gate_proj", "up_proj", "down_proj", "score"])},
    "a PeftModel": case(a_peft_model),
    "checkpointing": case(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}),
    "reentrant checkpointing": case(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}),
    "tokens": case(rows=TOKENS),
    "tokens under their older names": case(
        rows=[{f"{name[:-4]}_input_ids": ids for name, ids in row.items()} for row in TOKENS]
    ),
    "template variables": case(
        rows=[{**row, "chat_template_kwargs": {"loud": bool(i % 2)}} for i, row in enumerate(CHAT)],
        chat_template_path="template",
    ),
    "tools": case(rows=[{**row, "tools": [TOOL]} for row in CHAT]),
    "margin": case(rows=reward_rows("implicit", 9, margin=True)),
    "centred": case(center_rewards_coefficient=0.01),
}
FEW = ("experts", "adapter on experts", "template variables")


def build(cls: type, folders: dict[str, Path], folder: Path, drawn: dict[str, Any], **more: Any) -> Any:
    settings = {**SILENT, "learning_rate": 1e-2, "logging_steps": 1, "max_steps": 3, **drawn["settings"]}
    if "chat_template_path" in settings:
        settings["chat_template_path"] = str(folders["template"])
    model: Any = drawn["model"]
    held = model(folders) if isinstance(model, Callable) else str(folders[model])
    if "peft_config" in drawn:
        more["peft_config"] = drawn["peft_config"]()
    args = RewardConfig(str(folder / cls.__name__), **settings)
    rows = Dataset.from_list(drawn["rows"])
    return cls(model=held, args=args, train_dataset=rows, processing_class=tokenizer(), **more)


@pytest.mark.parametrize(
    "name", [name if name in FEW else pytest.param(name, marks=pytest.mark.wide) for name in CASES]
)
def test_what_trains_has_moved(folders, tmp_path, name):
    assert_the_same_moves(lambda cls: build(cls, folders, tmp_path, CASES[name]), RewardTrainer, MLXRewardTrainer)


@pytest.mark.parametrize("cls", [RewardTrainer, MLXRewardTrainer])
def test_evaluation_and_its_metrics(folders, tmp_path, cls):
    rows = Dataset.from_list(reward_rows("implicit", 4, seed=2))
    drawn = case(eval_strategy="steps", eval_steps=3)
    with warnings.catch_warnings(action="ignore"):
        trainer = build(
            cls,
            folders,
            tmp_path,
            drawn,
            eval_dataset={"data1": rows, "data2": rows},
            compute_metrics=lambda _: {"my": 0.5},
        )
        trainer.train()
        log = trainer.state.log_history
        assert log[-3]["eval_data1_loss"] > 0 and log[-2]["eval_data2_loss"] > 0 and log[-2]["eval_data2_my"] == 0.5
        assert trainer.evaluate(eval_dataset=rows)["eval_loss"] > 0
    assert {"reward-trainer", "trl"} <= set(trainer.model.model_tags)


@pytest.mark.parametrize(("cls", "error"), [(RewardTrainer, ValueError), (MLXRewardTrainer, HFMLXError)])
def test_another_number_of_labels(folders, tmp_path, cls, error):
    model = load(folders["qwen2"])
    model.config.num_labels = 2
    with pytest.raises(error, match=r"reward models require `num_labels=1`"), warnings.catch_warnings(action="ignore"):
        build(cls, folders, tmp_path, case(lambda folders: model))


def test_the_template_is_saved(folders, tmp_path):
    drawn = dict(CASES["template variables"])
    drawn["settings"] = drawn["settings"] | {"save_strategy": "steps", "save_steps": 3}
    with warnings.catch_warnings(action="ignore"):
        trainer = build(MLXRewardTrainer, folders, tmp_path, drawn)
        trainer.train()
    saved = tmp_path / "MLXRewardTrainer" / "checkpoint-3" / "chat_template.jinja"
    assert saved.read_text() == TEMPLATE
    texts = [trainer.processing_class.decode(row["chosen_ids"]) for row in trainer.train_dataset]
    assert np.array([text.startswith("USER:") for text in texts]).tolist() == [False, True, False, True, False]
