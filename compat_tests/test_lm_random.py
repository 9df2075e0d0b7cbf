"""Random configurations of MLXTrainer, drawn from a printed seed: every log entry is transformers.Trainer's.

``HF_MLX_SEED=7 pytest compat_tests/test_lm_random.py`` draws other ones.
"""

import os
import random
from typing import Any

import pytest
from lm_pairs import load, run_both, token_rows
from pairs import assert_same_log, tiny_model, untimed
from test_lm_trainer import KINDS, RELATIVE

SEED = int(os.environ.get("HF_MLX_SEED", "20260"))
# `make test` runs the first few of the same sequence that `make compat` runs in full.
SAMPLE, ALL = 4, 64
FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "phi3", "olmo2", "smollm3"]


def draw(index: int) -> tuple[str, str, dict[str, Any], dict[str, Any] | None, bool]:
    """Family, kind of rows, settings, LoRA options, and whether it evaluates, of one configuration."""
    pick = random.Random(f"{SEED}-{index}")
    kind = pick.choice(list(KINDS))
    settings = {
        "per_device_train_batch_size": pick.choice([1, 2, 3, 5]),
        "per_device_eval_batch_size": pick.choice([1, 2, 3, 5]),
        "gradient_accumulation_steps": pick.choice([1, 2, 3]),
        "max_steps": pick.choice([4, 6]),
        "learning_rate": pick.choice([1e-4, 1e-3]),
        "lr_scheduler_type": pick.choice(["linear", "cosine", "constant_with_warmup", "inverse_sqrt"]),
        "warmup_steps": pick.choice([0, 1, 0.3]),
        "optim": pick.choice(["adamw_torch", "sgd", "adagrad", "rmsprop", "adafactor"]),
        "weight_decay": pick.choice([0.0, 0.05]),
        "max_grad_norm": pick.choice([0.0, 0.1, 1.0]),
        "label_smoothing_factor": pick.choice([0.0, 0.0, 0.1]),
        "seed": pick.randrange(1000),
        "data_seed": pick.choice([None, 5]),
        "logging_steps": pick.choice([1, 2, 3]),
        "logging_first_step": pick.random() < 0.5,
        "gradient_checkpointing": pick.random() < 0.3,
        "dataloader_drop_last": pick.random() < 0.3,
    }
    evaluates = pick.random() < 0.5
    if evaluates:
        settings |= {"eval_strategy": "steps", "eval_steps": pick.choice([1, 2, 3])}
    lora = None
    if pick.random() < 0.5:
        lora = {"r": pick.choice([2, 4]), "lora_alpha": 8, "target_modules": "all-linear"}
    if kind != "flattening" and "stream" not in kind:
        settings["train_sampling_strategy"] = pick.choice(["random", "random", "sequential", "group_by_length"])
    return pick.choice(FAMILIES), kind, settings, lora, evaluates


def check(index: int, folder: Any) -> None:
    family, kind, settings, lora, evaluates = draw(index)
    print(f"HF_MLX_SEED={SEED} #{index}: {family} {kind} {settings} {lora}")
    tiny_model(family, folder, seed=index)

    def keywords() -> dict[str, Any]:
        made = dict(KINDS[kind]())
        if evaluates and "data_collator" in made and kind not in ("torch dataset", "seq2seq collator"):
            made["eval_dataset"] = token_rows(7, seed=index)
        elif evaluates:
            made["eval_dataset"] = made["train_dataset"]
        if kind == "padding collator":
            made["eval_dataset"] = made["train_dataset"] if evaluates else None
        return made

    (theirs, _), (ours, _) = run_both(lambda: load(folder, lora), settings, keywords)
    assert_same_log(untimed(theirs), untimed(ours), relative=RELATIVE)
    assert len(ours) >= 2


@pytest.mark.parametrize("index", range(SAMPLE))
def test_sample(index, tmp_path):
    check(index, tmp_path)


@pytest.mark.wide
@pytest.mark.parametrize("index", range(SAMPLE, ALL))
def test_all(index, tmp_path):
    check(index, tmp_path)
