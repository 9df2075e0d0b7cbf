"""Random data settings, drawn from a printed seed: odd batches, masks, short rows, packing, evaluation.

``HF_MLX_SEED=7 pytest compat_tests/test_trajectory_random_data.py`` draws other ones.
"""

import math
import os
import random
from typing import Any

import pytest
from datasets import Dataset
from draws import numbered
from pairs import SILENT, rows_of, tiny_model, untimed
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from hf_mlx import MLXSFTTrainer

pytestmark = pytest.mark.filterwarnings("ignore")

# As in test_trajectory_families: the promise of the library in fp32.
RELATIVE = 1e-4

SEED = int(os.environ.get("HF_MLX_SEED", "20261"))
SAMPLE, ALL = 5, 150
LORA: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def draw_rows(pick: random.Random, kind: str, count: int) -> list[dict[str, Any]]:
    """Rows of ``kind``; token rows are short, masked and labelled below 0 now and then, prompts are long."""
    if kind == "long":
        answers = ["", "a b", "the model learns a curve"]
        rows = [
            {"prompt": "w " * pick.choice([1, 3, 30, 50]), "completion": pick.choice(answers)} for _ in range(count)
        ]
        return [*rows, {"prompt": "a ", "completion": "b c d"}]
    if kind != "tokens":
        return rows_of(kind, count, seed=pick.randrange(99))
    rows = []
    for _ in range(count):
        ids = [pick.randrange(5, 300) for _ in range(pick.choice([1, 2, 3, 5, 9, 20, 40]))]
        trained = 0.0 if pick.random() < 0.25 else 0.6
        labels = [value if pick.random() < trained else -100 for value in ids]
        rows.append({"input_ids": ids, "labels": [*labels[:-1], -1] if pick.random() < 0.1 else labels})
    return [*rows, {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}]


def draw(index: int) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]], bool]:
    """Settings, training rows, evaluation rows, and whether an adapter is trained."""
    pick = random.Random(f"{SEED}-{index}")
    settings: dict[str, Any] = {
        "per_device_train_batch_size": pick.choice([1, 2, 3]),
        "per_device_eval_batch_size": pick.choice([1, 2, 3, 4, 7]),
        "gradient_accumulation_steps": pick.choice([1, 2, 3]),
        "max_steps": pick.choice([4, 6, -1]),
        "num_train_epochs": pick.choice([1, 1.5]),
        "learning_rate": pick.choice([1e-3, 1e-2]),
        "logging_steps": pick.choice([1, 2, 3, 5]),
        "logging_first_step": pick.random() < 0.3,
        "logging_nan_inf_filter": pick.random() < 0.8,
        "eval_strategy": pick.choice(["steps", "epoch", "no"]),
        "eval_steps": pick.choice([1, 2, 3]),
        "eval_on_start": pick.random() < 0.3,
        "dataloader_drop_last": pick.random() < 0.4,
        "label_smoothing_factor": pick.choice([0.0, 0.0, 0.1]),
        "max_length": pick.choice([12, 24, 48, None]),
        "train_sampling_strategy": pick.choice(["random", "sequential", "group_by_length"]),
        "seed": pick.randrange(1000),
        "pad_to_multiple_of": pick.choice([None, None, 8]),
        "include_num_input_tokens_seen": pick.choice(["no", "all", "non_padding"]),
    }
    settings["loss_type"] = "dft" if not settings["label_smoothing_factor"] and pick.random() < 0.3 else "nll"
    form = pick.random()
    if settings["max_length"] is None:
        settings["padding_free"] = form < 0.4
    else:
        settings["packing_strategy"] = pick.choice(["bfd", "bfd_split", "wrapped"])
        settings["packing"] = form < 0.35
        settings["eval_packing"] = pick.choice([None, True, False]) if form < 0.5 else None
    if settings.get("packing"):
        # Few rows are left, of which whole batches must be.
        settings["dataloader_drop_last"] &= settings["per_device_train_batch_size"] == 1
    kind = pick.choice(["tokens", "tokens", "long", "long", "text", "messages", "prompt"])
    train, held_out = draw_rows(pick, kind, pick.choice([9, 11, 16])), draw_rows(pick, kind, pick.choice([3, 5, 8]))
    return settings, train, held_out, pick.random() < 0.7


def run(trainer: Any, model: Any, out: Any, index: int) -> list[dict[str, Any]]:
    settings, train, held_out, lora = draw(index)
    made = trainer(
        str(model),
        SFTConfig(output_dir=str(out), **{**SILENT, **settings}),
        train_dataset=Dataset.from_list(train),
        eval_dataset=Dataset.from_list(held_out),
        peft_config=LoraConfig(**LORA) if lora else None,
    )
    made.train()
    made.evaluate()
    return untimed(made.state.log_history)


def check(index: int, folder: Any) -> None:
    print(f"HF_MLX_SEED={SEED} #{index}: {draw(index)[0]}")
    model = tiny_model("llama", folder / "model", seed=index, hidden_size=32, intermediate_size=48)
    theirs, ours = run(SFTTrainer, model, folder / "theirs", index), run(MLXSFTTrainer, model, folder / "ours", index)
    assert len(theirs) == len(ours) >= 2
    for a, b in zip(theirs, ours, strict=True):
        assert list(a) == list(b)
        for key, value in a.items():
            if isinstance(value, float) and math.isnan(value):
                assert math.isnan(b[key]), (key, a, b)
            else:
                assert abs(value - b[key]) <= RELATIVE * max(abs(value), 1e-3), (key, a, b)


@pytest.mark.parametrize("index", numbered(SAMPLE, ALL))
def test_drawn_data_have_trls_log(index, tmp_path):
    check(index, tmp_path)
