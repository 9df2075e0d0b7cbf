"""Every lr_scheduler_type beside the scheduler that transformers builds, over whole runs."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
import transformers
from transformers.trainer_utils import SchedulerType

from hf_mlx.settings.plan import OptimPlan, SchedulePlan
from hf_mlx.training.schedule import count_warmup, lr_at, make_schedule

# The operations are the same doubles in the same order; the bound allows for a reordered sum, nothing more.
RELATIVE = 1e-12

CURVES = {
    "linear": [{}],
    "cosine": [{}, {"num_cycles": 1.7}, {"num_cycles": 2}],
    "cosine_with_restarts": [{}, {"num_cycles": 3}],
    "polynomial": [{}, {"lr_end": 1e-5, "power": 2.0}, {"power": 0.5}],
    "constant": [{}],
    "constant_with_warmup": [{}],
    "inverse_sqrt": [{}, {"timescale": 17}],
    "cosine_with_min_lr": [{"min_lr": 1e-5}, {"min_lr_rate": 0.1, "num_cycles": 0.9}],
    "cosine_warmup_with_min_lr": [{"min_lr": 1e-5}, {"min_lr_rate": 0.1, "warmup_lr_rate": 0.25}, {"min_lr_rate": 0.0}],
    "warmup_stable_decay": [
        {"num_decay_steps": 5, "warmup_type": warmup, "decay_type": decay, **more}
        for warmup, decay in itertools.product(("linear", "cosine", "1-sqrt"), repeat=2)
        for more in ({}, {"min_lr_ratio": 0.1, "num_cycles": 0.4}, {"num_stable_steps": 3})
    ],
}
BY_METRIC = {
    "reduce_lr_on_plateau": [
        {"patience": 1},
        {"patience": 0, "factor": 0.5, "cooldown": 2, "min_lr": 1e-5},
        {"mode": "max", "patience": 1, "threshold_mode": "abs", "threshold": 0.05},
        {"mode": "max", "patience": 0, "eps": 1e-4},
        {"mode": "min", "patience": 2, "threshold_mode": "abs"},
    ],
    "greedy": [
        {},
        {"patience": 0, "min_lr": 1e-4, "max_lr": 2e-3},
        {"patience": 1, "min_lr": 5e-4, "cooldown": 2, "warmup": 3, "smooth": True, "window_size": 3},
        {"patience": 0, "min_lr": 9e-4, "factor": 0.9, "reset_start": 2, "mode": "max", "threshold_mode": "rel"},
    ],
}


def _scheduler(plan: SchedulePlan, base_lr: float, total: int, folder):
    """What the Trainer builds: two parameter groups, warmup counted by TrainingArguments."""
    parameter = torch.nn.Parameter(torch.ones(2))
    groups = [{"params": [parameter], "weight_decay": 0.1}, {"params": [], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=base_lr)
    args = transformers.TrainingArguments(str(folder), warmup_steps=plan.warmup_steps, use_cpu=True)
    warmup = args.get_warmup_steps(total)
    assert count_warmup(plan, total) == warmup
    return optimizer, transformers.get_scheduler(plan.name, optimizer, warmup, total, dict(plan.options))


def test_every_scheduler_type_is_here():
    assert {kind.value for kind in SchedulerType} == CURVES.keys() | BY_METRIC.keys()


# The Trainer always passes the total as well, so upstream warns whenever num_stable_steps is set.
@pytest.mark.filterwarnings("ignore:Both num_training_steps and num_stable_steps")
@pytest.mark.parametrize("name", CURVES)
def test_curve_equals_transformers_over_whole_runs(name, tmp_path):
    seen = 0
    for options, warmup, total in itertools.product(CURVES[name], (0, 1, 4, 0.1, 0.33), (1, 13, 50)):
        plan = SchedulePlan(name, warmup, options)
        optimizer, theirs = _scheduler(plan, 3e-4, total, tmp_path)
        ours = make_schedule(plan, OptimPlan(learning_rate=3e-4), total)
        # inverse_sqrt and polynomial of upstream divide by zero where the warmup fills the run exactly.
        steps = total if name == "polynomial" and count_warmup(plan, total) == total else total + 3
        for step in range(steps):
            assert math.isclose(ours.lr(step), theirs.get_last_lr()[0], rel_tol=RELATIVE), (plan, total, step)
            assert lr_at(step, 3e-4, plan, total) == ours.lr(step)
            if step == steps - 1:
                break
            optimizer.step()
            theirs.step()
        assert ours.state_dict(steps - 1) == theirs.state_dict(), (plan, total)
        seen += 1
    assert seen == len(CURVES[name]) * 15


@pytest.mark.parametrize(("name", "options"), [(name, options) for name in BY_METRIC for options in BY_METRIC[name]])
def test_metric_schedule_equals_transformers(name, options, tmp_path):
    plan = SchedulePlan(name, 0, options)
    optimizer, theirs = _scheduler(plan, 1e-3, 100, tmp_path)
    ours = make_schedule(plan, OptimPlan(learning_rate=1e-3), 100)
    draw, rates = random.Random(1), set()
    for step in range(120):
        metric = 2 + math.sin(step / 9) + draw.uniform(-0.2, 0.2)
        theirs.step(metric)
        ours.step_metric(metric)
        assert math.isclose(ours.lr(step), optimizer.param_groups[0]["lr"], rel_tol=RELATIVE)
        assert ours.state_dict(step) == theirs.state_dict()
        rates.add(ours.lr(step))
        if step == 60:
            # Goes on in a fresh object from torch's own state.
            ours = make_schedule(plan, OptimPlan(learning_rate=5.0), 100)
            ours.load_state_dict(theirs.state_dict())
    assert len(rates) > 1 or options == {}  # greedy's default min_lr is above the learning rate
