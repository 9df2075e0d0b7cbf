"""Real weights in bf16: SmolLM2 under autocast follows TRL, as near as rounding lets two computations be."""

import materials
import numpy as np
import pytest
from pairs import run_both, run_mlx

# Rounding parts two bf16 computations of one model at the last bit, and thirty layers round what has parted again. The
# loss of one token then differs by 0.05 to 0.07 (rms, forward only): MLX from torch, and no less torch from itself with
# another attention implementation. A step averages that over its tokens. The promise is 2e-3, at 1,024 tokens a step.
# Measured: 2.4e-3 at 254 and 2.1e-3 at 500; TRL with eager attention beside TRL as it is, 1.9e-3 at 500.
MEAN, TOKENS = 2e-3, 1024
# Rounding has no direction, so the mean of the signed differences is within three standard errors of zero, and so is
# the number of steps above TRL. Weights that have parted stay parted: from step to step differences correlate by 0.25
# at most (32 tiny models), which makes the errors 1.3 times larger. A missing cast would move every step one way.
ERRORS = 3 * 1.3

SETTINGS = {
    "bf16": True,
    "learning_rate": 5e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "logging_steps": 1,
    "max_length": 64,
    "gradient_checkpointing": False,
}
LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


# In `make test` bf16 is compared on tiny models, in test_trajectory_bf16.
@pytest.mark.wide
@pytest.mark.parametrize(
    ("steps", "rows", "accumulated", "count"),
    [(8, 2, 1, 16), pytest.param(50, 4, 2, 164, marks=pytest.mark.timeout(7200))],
    ids=["sample", "fifty steps"],
)
def test_autocast(steps, rows, accumulated, count):
    problems = materials.human_eval()[:count]
    texts = [{"text": problem["prompt"] + problem["completion"]} for problem in problems]
    settings = {**SETTINGS, "max_steps": steps, "per_device_train_batch_size": rows}
    settings["gradient_accumulation_steps"] = accumulated
    theirs, ours = run_both(materials.smollm2(), settings, texts, LORA)
    logged = [[entry for entry in run.history if "loss" in entry] for run in (theirs, ours)]
    assert [entry["num_tokens"] for entry in logged[0]] == [entry["num_tokens"] for entry in logged[1]]
    losses = [[entry["loss"] for entry in entries] for entries in logged]
    assert len(losses[0]) == len(losses[1]) == steps
    difference = np.subtract(losses[1], losses[0])
    tokens = logged[0][-1]["num_tokens"] / steps
    above = int((difference > 0).sum())
    size, drift = abs(difference).mean(), difference.mean()
    print(f"{steps} steps of {tokens:.0f} tokens: mean |d| {size:.1e}, mean d {drift:+.1e}, above TRL in {above}")
    assert size <= MEAN * (TOKENS / tokens) ** 0.5
    assert abs(drift) <= ERRORS * difference.std(ddof=1) / steps**0.5
    assert abs(above - steps / 2) <= ERRORS * steps**0.5 / 2
    # Something was learnt, so that there was a curve to follow: without training the last rows cost more.
    untrained = run_mlx(materials.smollm2(), settings | {"learning_rate": 0.0}, texts, LORA).history
    last = slice(-(steps // 2), None)
    gain = np.subtract([entry["loss"] for entry in untrained if "loss" in entry], losses[0])[last].mean()
    print(f"learnt by then: {gain:.2f}")
    assert gain > 10 * size
