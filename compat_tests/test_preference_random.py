"""Random configurations of MLXDPOTrainer, drawn from a printed seed: every log entry is trl.DPOTrainer's.

``HF_MLX_SEED=7 pytest compat_tests/test_preference_random.py`` draws other ones.
"""

import os
import random
from typing import Any

import pytest
from datasets import Dataset
from pairs import tiny_model
from preference_pairs import FORMATS, REFERENCES, assert_same_log, preference_rows, run_both

from hf_mlx.settings.dpo_config import DIVERGENCES, LOSS_TYPES, WITH_DIVERGENCE

# The promise of the library in fp32.
RELATIVE = 1e-4
SEED = int(os.environ.get("HF_MLX_SEED", "20260"))
# `make test` runs the first few of the same sequence that `make compat` runs in full.
SAMPLE, ALL = 2, 102
FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "phi3", "olmo2", "smollm3", "gemma3_text"]
SCHEDULES = ["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"]
# With rates at which pairs come apart by more than the rounding of their log-probabilities: the sign of less is noise.
# They are far above what preference training uses, and some losses explode at them.
OPTIMIZERS = {"adamw_torch": 2e-3, "sgd": 0.1, "adagrad": 2e-3, "rmsprop": 3e-4, "adafactor": 2e-3}
# exp of a log-ratio, a square or a steep sigmoid of one: at these rates gradients grow to thousands within a few steps,
# rounding with them, and some runs of forward_kl end in inf.
STEEP = {"forward_kl": 0.03, "alpha_divergence": 0.3, "discopop": 0.3, "ipo": 0.3, "sppo_hard": 0.3}


def draw_loss(pick: random.Random) -> dict[str, Any]:
    """One loss or a mix of them, with the numbers that they read."""
    divergence = pick.choice(["reverse_kl", *DIVERGENCES])
    names = [name for name in LOSS_TYPES if divergence == "reverse_kl" or name in WITH_DIVERGENCE]
    chosen = pick.sample(names, pick.choice([1, 1, 1, 2, 3]))
    beta = pick.choice([0.05, 0.1, 0.5])
    settings = {
        "loss_type": chosen,
        "loss_weights": [pick.choice([0.2, 0.5, 1.0, 2.0]) for _ in chosen] if pick.random() < 0.5 else None,
        "f_divergence_type": divergence,
        "f_alpha_divergence_coef": pick.choice([0.3, 0.5, 1.0, 1.7]),
        "beta": beta,
        "label_smoothing": pick.choice([0.05, 0.2]) if "exo_pair" in chosen else pick.choice([0.0, 0.1, 0.3]),
        "discopop_tau": beta * pick.choice([0.5, 5]),
        "ld_alpha": pick.choice([None, None, 0.0, 0.3, 1.0]),
    }
    # TRL refuses these with its weights, or fails on them in torch.
    barred = {"aot", "aot_unpaired", "sft", "hinge"}
    return settings | {"use_weighting": not barred.intersection(chosen) and pick.random() < 0.3}


def draw_lora(pick: random.Random) -> dict[str, Any]:
    lora: dict[str, Any] = {
        "r": pick.choice([2, 4]),
        "lora_alpha": pick.choice([4, 8]),
        "lora_dropout": pick.choice([0.0, 0.1]),
        "use_rslora": pick.random() < 0.3,
        "use_dora": pick.random() < 0.15,
        "target_modules": pick.choice(["all-linear", ["o_proj"], ["down_proj", "o_proj"]]),
        "task_type": "CAUSAL_LM",
    }
    if pick.random() < 0.15:
        lora["modules_to_save"] = pick.choice([["norm"], ["embed_tokens"]])
    if pick.random() < 0.2:
        lora["rank_pattern"] = {r"layers\.0\..*o_proj": 6}
    return lora


def draw(index: int) -> dict[str, Any]:
    """One configuration: family, kind of rows, reference, settings, LoRA options and how many rows."""
    pick = random.Random(f"{SEED}-{index}")
    reference, kind = pick.choice(REFERENCES), pick.choice(FORMATS)
    optimizer, rate = pick.choice(list(OPTIMIZERS.items()))
    loss = draw_loss(pick)
    rate *= min(STEEP.get(name, 1) for name in (loss["f_divergence_type"], *loss["loss_type"]))
    settings = {
        "per_device_train_batch_size": pick.choice([1, 2, 3, 5]),
        "gradient_accumulation_steps": pick.choice([1, 2, 3]),
        "max_steps": pick.choice([4, 6]),
        "learning_rate": rate * pick.choice([0.3, 1, 2]),
        "lr_scheduler_type": pick.choice(SCHEDULES),
        "warmup_steps": pick.choice([0, 1, 0.3]),
        "optim": optimizer,
        "weight_decay": pick.choice([0.0, 0.05]),
        "max_grad_norm": pick.choice([0.0, 0.1, 1.0]),
        "seed": pick.randrange(1000),
        "data_seed": pick.choice([None, 5]),
        # What rounding decides where the reference is precomputed is looked at step by step.
        "logging_steps": 1 if "precomputed" in reference else pick.choice([1, 2, 3]),
        "logging_first_step": pick.random() < 0.5,
        # Some rates are more than a loss bears: NaN is then compared with NaN.
        "logging_nan_inf_filter": False,
        "gradient_checkpointing": pick.random() < 0.3,
        "dataloader_drop_last": pick.random() < 0.3,
        # A template's own tokens come on top; some prompts of either kind fill the row.
        "max_length": pick.choice([44 if "chat" in kind else 20, 56, 512, None]),
        "truncation_mode": pick.choice(["keep_start", "keep_end"]),
        "pad_to_multiple_of": pick.choice(["auto", None, 8]),
        "train_sampling_strategy": pick.choice(["random", "random", "sequential"]),
        "precompute_ref_batch_size": pick.choice([None, 2, 7]),
        **loss,
    }
    if pick.random() < 0.5:
        settings |= {
            "eval_strategy": pick.choice(["steps", "epoch"]),
            "eval_steps": pick.choice([1, 2, 3]),
            "eval_on_start": pick.random() < 0.3,
            "per_device_eval_batch_size": pick.choice([1, 3, 4]),
        }
    return {
        "family": pick.choice(FAMILIES),
        "kind": kind,
        "reference": reference,
        "settings": settings,
        "lora": draw_lora(pick),
        "rows": pick.choice([13, 16, 21]),
    }


def check(index: int, folder: Any) -> None:
    drawn = draw(index)
    print(f"HF_MLX_SEED={SEED} #{index}: {drawn}")
    settings, reference = drawn["settings"], drawn["reference"]
    more = {}
    if "eval_strategy" in settings:
        more["eval_dataset"] = Dataset.from_list(preference_rows(drawn["kind"], 7, seed=index + 1000))
    model = tiny_model(drawn["family"], folder, seed=index)
    rows = preference_rows(drawn["kind"], drawn["rows"], seed=index)
    theirs, ours = run_both(model, settings, rows, reference, drawn["lora"], **more)
    compared = assert_same_log(theirs, ours, relative=RELATIVE, beta=settings["beta"], reference=reference)
    assert compared >= 14 * (settings["max_steps"] // settings["logging_steps"])


@pytest.mark.parametrize("index", range(SAMPLE))
def test_sample(index, tmp_path):
    check(index, tmp_path)


@pytest.mark.wide
@pytest.mark.parametrize("index", range(SAMPLE, ALL))
def test_all(index, tmp_path):
    check(index, tmp_path)
