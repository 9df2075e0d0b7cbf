"""Random configurations of MLXRewardTrainer, drawn from a printed seed: every log entry is trl.RewardTrainer's.

``HF_MLX_SEED=7 pytest compat_tests/test_reward_random.py`` draws other ones.
"""

import os
import random
from typing import Any

import pytest
from datasets import Dataset
from draws import FAMILIES, draw_adapter, draw_evaluation, draw_training, numbered
from pairs import tiny_model
from reward_pairs import FORMATS, MODELS, assert_same_log, reward_rows, run_both

# The promise of the library in fp32.
RELATIVE, LOSS = 1e-4, 1e-5
SEED = int(os.environ.get("HF_MLX_SEED", "20261"))
SAMPLE, ALL = 4, 46
OPTIMIZERS = {"adamw_torch": 2e-3, "sgd": 0.03, "adagrad": 2e-3, "rmsprop": 1e-4, "adafactor": 2e-3}


def draw_lora(pick: random.Random) -> dict[str, Any]:
    lora = {
        **draw_adapter(pick),
        "init_lora_weights": pick.choice([True, True, "gaussian", "pissa"]),
        "target_modules": pick.choice(["all-linear", ["o_proj"], ["down_proj", "o_proj"]]),
        "task_type": pick.choice(["SEQ_CLS", "SEQ_CLS", "SEQ_CLS", None]),
    }
    if pick.random() < 0.3:
        lora["modules_to_save"] = pick.choice([["norm"], ["embed_tokens"], ["score"]])
    if "score" in lora.get("modules_to_save", ()) and lora["task_type"] is None:
        # PEFT puts a pair around the score then, before it is to be saved.
        lora["target_modules"] = ["o_proj"]
    if pick.random() < 0.2:
        lora["rank_pattern"] = {r"layers\.0\..*o_proj": 6}
    return lora


def draw(index: int) -> dict[str, Any]:
    """One configuration: family, kind of rows, model, settings, LoRA options and how many rows."""
    pick = random.Random(f"{SEED}-{index}")
    kind = pick.choice(FORMATS)
    optimizer, rate = pick.choice(list(OPTIMIZERS.items()))
    settings = {
        **draw_training(pick, optimizer, rate),
        # A template's own tokens come on top; some rows are left out.
        "max_length": pick.choice([88 if "chat" in kind else 56, 512, None]),
        "pad_to_multiple_of": pick.choice(["auto", None, 8]),
        "pad_token": pick.choice([None, None, "</s>", "<|im_end|>"]),
        "eos_token": pick.choice([None, None, "<|im_end|>"]),
        "train_sampling_strategy": pick.choice(["random", "random", "sequential"]),
        "center_rewards_coefficient": pick.choice([None, 0.01, 0.3]),
    }
    settings |= draw_evaluation(pick)
    return {
        "family": pick.choice(FAMILIES),
        "kind": kind,
        "margin": pick.random() < 0.4,
        "model": pick.choice(MODELS),
        "settings": settings,
        "lora": draw_lora(pick),
        "rows": pick.choice([13, 16, 21]),
    }


def check(index: int, folder: Any) -> None:
    drawn = draw(index)
    print(f"HF_MLX_SEED={SEED} #{index}: {drawn}")
    settings = drawn["settings"]
    more = {}
    if "eval_strategy" in settings:
        rows = reward_rows(drawn["kind"], 7, seed=index + 1000, margin=drawn["margin"])
        more["eval_dataset"] = Dataset.from_list(rows)
    model = tiny_model(drawn["family"], folder / "model", seed=index)
    rows = reward_rows(drawn["kind"], drawn["rows"], seed=index, margin=drawn["margin"])
    theirs, ours = run_both(model, settings, rows, drawn["model"], drawn["lora"], **more)
    compared = assert_same_log(theirs, ours, relative=RELATIVE, loss=LOSS)
    assert compared >= 10 * (settings["max_steps"] // settings["logging_steps"])


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("index", numbered(SAMPLE, ALL))
def test_a_drawn_script_logs_what_trl_logs(index, tmp_path):
    check(index, tmp_path)
