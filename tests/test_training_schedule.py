"""Learning rates a user would look at: starts, peaks, ends, and what is refused."""

import json

import pytest

from hf_mlx.errors import SettingError
from hf_mlx.settings.plan import OptimPlan, SchedulePlan
from hf_mlx.training.schedule import count_warmup, lr_at, make_schedule

NEEDED = {
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 4},
}


def _rates(name, warmup=0, total=10, lr=1.0, **options):
    schedule = make_schedule(
        SchedulePlan(name, warmup, {**NEEDED.get(name, {}), **options}), OptimPlan(name, lr), total
    )
    return [schedule.lr(step) for step in range(total + 1)]


@pytest.mark.parametrize("name", ["linear", "cosine", "constant_with_warmup", "polynomial", "inverse_sqrt"])
def test_warmup_rises_from_zero_to_the_peak(name):
    rates = _rates(name, warmup=4, total=12, lr=2.0)
    assert rates[:5] == pytest.approx([0, 0.5, 1.0, 1.5, 2.0])


@pytest.mark.parametrize(
    ("name", "middle", "end"),
    [
        ("linear", 0.5, 0.0),
        ("cosine", 0.5, 0.0),
        ("cosine_with_restarts", 0.5, 0.0),
        ("constant", 1.0, 1.0),
        ("polynomial", 0.5, 1e-7),
        ("cosine_with_min_lr", 0.55, 0.1),
        ("warmup_stable_decay", 1.0, 0.0),
    ],
)
def test_middle_and_end_of_a_run(name, middle, end):
    rates = _rates(name)
    assert rates[0] == 1.0
    assert rates[5] == pytest.approx(middle, abs=1e-6)
    assert rates[10] == pytest.approx(end, abs=1e-12)


def test_the_warmup_of_cosine_warmup_with_min_lr_moves_at_once():
    assert _rates("cosine_warmup_with_min_lr", warmup=4)[:4] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize(("warmup", "steps"), [(0, 0), (3, 3), (1, 1), (2.9, 2), (0.1, 2), (0.05, 1), (0.11, 3)])
def test_warmup_is_a_count_from_one_on_and_a_ratio_rounded_up_below(warmup, steps):
    assert count_warmup(SchedulePlan(warmup_steps=warmup), 20) == steps


def test_lr_at_is_the_schedules_own():
    plan = SchedulePlan("cosine", 2)
    assert lr_at(7, 3e-4, plan, 10) == make_schedule(plan, OptimPlan(learning_rate=3e-4), 10).lr(7)


def test_plateau_reduces_after_more_than_patience_bad_evaluations():
    plan = SchedulePlan("reduce_lr_on_plateau", options={"patience": 1, "factor": 0.5})
    schedule = make_schedule(plan, OptimPlan(learning_rate=0.4), 10)
    assert schedule.by_metric
    rates = []
    for metric in (1.0, 1.0, 1.0, 0.5, 0.6, 0.6):
        schedule.step_metric(metric)
        rates.append(schedule.lr(0))
    assert rates == [0.4, 0.4, 0.2, 0.2, 0.2, 0.1]


def test_greedy_raises_after_improvements_and_reduces_after_a_plateau():
    plan = SchedulePlan("greedy", options={"patience": 1, "factor": 0.5, "min_lr": 0.0})
    schedule = make_schedule(plan, OptimPlan(learning_rate=0.2), 10)
    rates = []
    for metric in (3.0, 2.0, 2.0, 2.0):
        schedule.step_metric(metric)
        rates.append(schedule.lr(0))
    assert rates == [0.2, 0.4, 0.4, 0.2]


@pytest.mark.parametrize("name", ["linear", "reduce_lr_on_plateau", "greedy"])
def test_a_loaded_state_goes_on_where_the_other_stopped(name):
    options = {"patience": 0} if name != "linear" else {}
    plan = SchedulePlan(name, options=options)
    first = make_schedule(plan, OptimPlan(learning_rate=0.3), 10)
    for metric in (1.0, 2.0, 3.0):
        first.step_metric(metric)
    state = json.loads(json.dumps(first.state_dict(3)))
    # As in torch the checkpoint's learning rate wins over the new one.
    second = make_schedule(plan, OptimPlan(learning_rate=0.9), 10)
    second.load_state_dict(state)
    assert second.lr(3) == first.lr(3)
    assert second.state_dict(3) == first.state_dict(3)


@pytest.mark.parametrize(
    ("name", "options", "lr", "message"),
    [
        ("lineal", {}, 1e-3, "one of constant"),
        ("linear", {"num_cycles": 2}, 1e-3, "num_cycles"),
        ("warmup_stable_decay", {}, 1e-3, "num_decay_steps"),
        ("cosine_with_min_lr", {}, 1e-3, "exactly one of min_lr and min_lr_rate"),
        ("cosine_with_min_lr", {"min_lr": 1e-5, "min_lr_rate": 0.1}, 1e-3, "exactly one"),
        ("polynomial", {"lr_end": 1e-2}, 1e-3, "lr_end must be smaller"),
        ("reduce_lr_on_plateau", {"factor": 1.5}, 1e-3, "a factor below 1"),
    ],
)
def test_a_schedule_that_cannot_be_made_is_refused_with_the_reason(name, options, lr, message):
    with pytest.raises(SettingError, match=message):
        make_schedule(SchedulePlan(name, options=options), OptimPlan(learning_rate=lr), 10)
