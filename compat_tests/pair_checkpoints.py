"""What checkpoints of preference and of reward training are compared with TRL's by."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from datasets import Dataset
from huggingface_hub import ModelCard
from pairs import SILENT, tiny_model
from preference_pairs import preference_rows

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
# 10 rows in micro-batches of 2, windows of 2: an epoch is 3 steps, the last of one micro-batch.
SETTINGS = {**SILENT, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 6,
            "learning_rate": 1e-3, "logging_steps": 1, "save_strategy": "steps", "save_steps": 2}  # fmt: skip
ROWS = Dataset.from_list(preference_rows("text", 10))
#: Files of a checkpoint that TRL does not write.
OWN = {"hf_mlx_manifest.json", "hf_mlx_state.json"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's folder."""
    return tiny_model("llama", tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Uncompiled: the functions are the same, and are compared compiled where training is."""
    mx.disable_compile()
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    mx.enable_compile()
    logging.disable(logging.NOTSET)


def assert_same_files(theirs: Path, ours: Path) -> set[str]:
    """Of two output folders' checkpoints of step 4: TRL's, with :data:`OWN`. Returns TRL's."""
    files = []
    for output in (theirs, ours):
        folder = output / "checkpoint-4"
        files.append({str(path.relative_to(folder)) for path in folder.rglob("*")})
        assert (output / "README.md").is_file()
    assert files[1] == files[0] | OWN
    return files[0]


def entries_after(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the two steps after that checkpoint."""
    went_on = [entry for entry in log if "loss" in entry and entry["step"] > 4]
    assert len(went_on) == 2
    return went_on


def assert_same_arrays(first: Any, second: Any) -> None:
    """What two of our trainers have trained, bit for bit."""
    one, other = (trainer.session.step.params for trainer in (first, second))
    assert one.keys() == other.keys() and len(one) >= 8
    assert all(np.array_equal(np.array(value), np.array(other[name])) for name, value in one.items())


def assert_cards_agree(theirs: Path, ours: Path) -> list[str]:
    """Model cards of an adapter's output folders. Returns their texts."""
    cards = [ModelCard.load(folder / "README.md") for folder in (theirs, ours)]
    one, other = (card.data.to_dict() for card in cards)
    assert set(one["tags"]) <= set(other["tags"])
    # Of an adapter TRL's card says "transformers", which does not load it alone.
    assert other["model_name"] == one["model_name"] and other["library_name"] == "peft"
    return [card.text for card in cards]
