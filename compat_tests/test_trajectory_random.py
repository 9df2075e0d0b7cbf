"""Random configurations, drawn from a printed seed: every log entry is TRL's.

``HF_MLX_SEED=7 pytest compat_tests/test_trajectory_random.py`` draws other ones.
"""

import os
import random
from typing import Any

import pytest
from datasets import Dataset
from draws import numbered
from pairs import FAMILIES, assert_same_curve, rows_of, run_both, tiny_model

# As in test_trajectory_families: the promise of the library in fp32.
RELATIVE = 1e-4
WEIGHTS = 1e-3

SEED = int(os.environ.get("HF_MLX_SEED", "20260"))
SAMPLE, ALL = 5, 208

SCHEDULES: list[tuple[str, dict[str, Any] | None]] = [
    ("linear", None),
    ("cosine", None),
    ("cosine_with_restarts", {"num_cycles": 2}),
    ("polynomial", {"power": 2.0}),
    ("constant", None),
    ("constant_with_warmup", None),
    ("inverse_sqrt", None),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
    ("warmup_stable_decay", {"num_decay_steps": 2}),
]
OPTIMIZERS = ["adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop", "adafactor"]


def draw(index: int) -> tuple[str, dict[str, Any], str, dict[str, Any] | None]:
    """Family, settings, kind of rows and LoRA options of one configuration."""
    pick = random.Random(f"{SEED}-{index}")
    schedule, kwargs = pick.choice(SCHEDULES)
    packed = pick.random() < 0.25
    settings = {
        "per_device_train_batch_size": pick.choice([1, 2, 3, 5, 7]),
        "gradient_accumulation_steps": pick.choice([1, 2, 3]),
        "max_steps": pick.choice([4, 6]),
        "learning_rate": pick.choice([1e-4, 1e-3]),
        "lr_scheduler_type": schedule,
        "lr_scheduler_kwargs": kwargs,
        "warmup_steps": pick.choice([0, 1, 0.3]),
        "optim": pick.choice(OPTIMIZERS),
        "weight_decay": pick.choice([0.0, 0.05]),
        "max_grad_norm": pick.choice([0.0, 0.1, 1.0]),
        "seed": pick.randrange(1000),
        "data_seed": pick.choice([None, 5]),
        "logging_steps": pick.choice([1, 2, 3]),
        "logging_first_step": pick.random() < 0.5,
        "gradient_checkpointing": pick.random() < 0.3,
        "label_smoothing_factor": pick.choice([0.0, 0.0, 0.1]),
        "loss_type": "nll",
        "max_length": pick.choice([32, 64]),
        "packing": packed,
        "packing_strategy": pick.choice(["bfd", "wrapped"]) if packed else "bfd",
        "train_sampling_strategy": pick.choice(["random", "random", "sequential", "group_by_length"]),
        "dataloader_drop_last": pick.random() < 0.3,
    }
    settings |= draw_evaluation(pick)
    if packed and settings["per_device_train_batch_size"] > 3:
        # So few packed rows that no batch would be whole: refused here, an error in trl.
        settings["dataloader_drop_last"] = False
    if not settings["label_smoothing_factor"] and pick.random() < 0.2:
        settings["loss_type"] = "dft"
    lora = {
        "r": pick.choice([2, 4, 8]),
        "lora_alpha": pick.choice([4, 16]),
        "use_rslora": pick.random() < 0.3,
        "target_modules": pick.choice(["all-linear", ["o_proj"], ["down_proj", "o_proj"]]),
        "task_type": "CAUSAL_LM",
    }
    # Each alone and both; the names end in one that is adapted whatever target_modules is.
    for name, values in (("rank_pattern", [1, 3, 6]), ("alpha_pattern", [2, 8, 12])):
        if pick.random() < 0.4:
            keys = pick.sample(["o_proj", r"layers\.0\..*o_proj", "self_attn.o_proj"], pick.choice([1, 2]))
            lora[name] = {key: pick.choice(values) for key in keys}
    kind = pick.choice(["text", "prompt", "messages"])
    return pick.choice(list(FAMILIES)), settings, kind, lora if pick.random() < 0.8 else None


def draw_evaluation(pick: random.Random) -> dict[str, Any]:
    """When to evaluate and in which batches; half of the runs do."""
    if pick.random() < 0.5:
        return {"eval_strategy": "no"}
    return {
        "eval_strategy": pick.choice(["steps", "epoch"]),
        "eval_steps": pick.choice([1, 2, 3, 0.5]),
        "eval_delay": pick.choice([0, 0, 2]),
        "eval_on_start": pick.random() < 0.3,
        "per_device_eval_batch_size": pick.choice([1, 3, 4, 5, 7]),
        "eval_packing": pick.choice([None, False]),
    }


def check(index: int, folder: Any) -> None:
    family, settings, kind, lora = draw(index)
    print(f"HF_MLX_SEED={SEED} #{index}: {family} {kind} {settings} {lora}")
    keywords = {}
    if settings["eval_strategy"] != "no":
        keywords["eval_dataset"] = Dataset.from_list(rows_of(kind, 11, seed=index + 1000))
    model, rows = tiny_model(family, folder, seed=index), rows_of(kind, 21, seed=index)
    theirs, ours = run_both(model, settings, rows, lora, **keywords)
    for a, b in zip(theirs.history, ours.history, strict=True):
        assert list(a) == list(b), f"step {a['step']}: keys or their order"
    assert assert_same_curve(theirs, ours, relative=RELATIVE, weights=WEIGHTS) >= 8


@pytest.mark.parametrize("index", numbered(SAMPLE, ALL))
def test_a_drawn_run_has_trls_curve(index, tmp_path):
    check(index, tmp_path)
