"""Rows over the cores of a CPU: the numbers of one core, in every kind of window."""

import threading
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from tiny_checkpoints import write_llama

from hf_mlx import blas
from hf_mlx.data.collate import collate
from hf_mlx.models.load import load_model
from hf_mlx.recipes.sft import SFT
from hf_mlx.session import Session
from hf_mlx.settings.plan import CheckpointingPlan, LoraPlan, LossPlan, OptimPlan
from hf_mlx.settings.resolve import resolve_plan
from hf_mlx.training import lanes
from hf_mlx.training.inputs import make_inputs
from hf_mlx.training.lanes import LanedStep, count_lanes
from hf_mlx.training.splitting import Splitting

# fp32: the same sums in another order; a lost or doubled row is 1e-1.
RELATIVE = 2e-6
WEIGHTS = 1e-5
STEPS, RATE = 3, 0.05


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def plan():
    plan, _ = resolve_plan({"output_dir": "unused", "gradient_checkpointing": False, "bf16": False})
    lora = LoraPlan(r=4, target_modules=("q_proj", "v_proj", "down_proj"), task_type="CAUSAL_LM")
    return replace(plan, lora=lora, optim=OptimPlan(name="sgd", options={"momentum": 0.9}))


def windows_of(counts):
    """For each step micro-batches of so many rows, of uneven length."""
    draw = np.random.default_rng(0)

    def batch(count):
        return collate(
            [{"input_ids": draw.integers(3, 64, draw.integers(6, 30)).tolist()} for _ in range(count)], pad_token_id=0
        )

    return [[make_inputs(batch(count), 0) for count in counts] for _ in range(STEPS)]


def make(folder, plan, count, monkeypatch):
    monkeypatch.setattr(lanes, "count_lanes", lambda: count)
    session = Session(plan, load_model(folder, plan.model), SFT)
    session.loaded.model.train()
    assert isinstance(session.step, LanedStep) == (count > 1)
    return session.step


def train(step, windows, compute=None):
    curve = []
    for number, window in enumerate(windows, 1):
        metrics = (compute or step)(window, number, RATE)
        values = [
            metrics.loss,
            metrics.grad_norm,
            metrics.metrics["entropy"],
            metrics.metrics["mean_token_accuracy"],
            metrics.micro_batches,
        ]
        curve.append([value.item() for value in values])
    return np.array(curve)


def assert_same(ours, theirs, ours_curve, theirs_curve):
    np.testing.assert_allclose(ours_curve, theirs_curve, rtol=RELATIVE)
    for name, value in theirs.params.items():
        value = np.array(value)
        assert np.linalg.norm(np.array(ours.params[name]) - value) <= WEIGHTS * np.linalg.norm(value), name
    assert ours.draws == theirs.draws and len(theirs.params) == 12


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("counts", [(4,), (5, 3), (1, 4, 1), (1,)], ids=str)
def test_lanes_change_no_number(folder, plan, counts, count, monkeypatch):
    windows = windows_of(counts)
    laned, plain = make(folder, plan, count, monkeypatch), make(folder, plan, 1, monkeypatch)
    assert_same(laned, plain, train(laned, windows), train(plain, windows))


def test_dropout_noise_and_checkpointing_neither(folder, plan, monkeypatch):
    plan = replace(
        plan,
        lora=replace(plan.lora, lora_dropout=0.3),
        loss=LossPlan(neftune_noise_alpha=5.0),
        checkpointing=CheckpointingPlan(enabled=True),
    )
    windows = windows_of((4, 2))
    laned, plain = make(folder, plan, 2, monkeypatch), make(folder, plan, 1, monkeypatch)
    assert_same(laned, plain, train(laned, windows), train(plain, windows))


def test_pieces_of_a_large_micro_batch_go_through_lanes(folder, plan, monkeypatch):
    windows = windows_of((8,))
    laned, plain = make(folder, plan, 2, monkeypatch), make(folder, plan, 1, monkeypatch)
    curve = train(laned, windows, Splitting(laned, lambda rows, _: rows, 4))
    assert_same(laned, plain, curve, train(plain, windows))


def test_gradients_of_an_unfinished_window_survive(folder, plan, monkeypatch):
    windows = windows_of((4, 4))
    made = []
    for count in (2, 1):
        step = make(folder, plan, count, monkeypatch)
        step.accumulate(windows[0], 1)
        carried = step.take_carried()
        curve = train(step, windows[1:])
        made.append((step, np.vstack([[carried.loss.item(), 0, carried.metrics["entropy"].item(), 0, 1], curve])))
    (laned, ours), (plain, theirs) = made
    assert_same(laned, plain, ours, theirs)


def test_without_threads_one_core_computes(folder, plan, monkeypatch):
    started, start = [], threading.Thread.start

    def refuse_second(thread):
        started.append(thread)
        if len(started) > 1:
            raise RuntimeError("can't start new thread")
        start(thread)

    windows, laned = windows_of((4,)), make(folder, plan, 2, monkeypatch)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse_second)
        step = Session(plan, load_model(folder, plan.model), SFT).step
    assert len(started) == 2 and not isinstance(step, LanedStep)
    step.objective.model.train()
    assert_same(laned, step, train(laned, windows), train(step, windows))


class FailsSecond:
    """An objective without room for a second lane."""

    def __init__(self, objective):
        self.objective, self.asked = objective, 0

    def __getattr__(self, name):
        return getattr(self.objective, name)

    def __call__(self, params, arrays):
        self.asked += 1
        if self.asked == 2:
            raise RuntimeError("no room")
        return self.objective(params, arrays)


def test_what_fails_in_one_lane_is_raised_once_all_have_ended(folder, plan, monkeypatch):
    step = make(folder, plan, 2, monkeypatch)
    window = windows_of((4,))[0]
    threads = blas.blas_threads()
    objective = step.objective
    step.objective = failing = FailsSecond(objective)
    held = step.hold()
    with pytest.raises(RuntimeError, match="no room"):
        step(window, 1, RATE)
    step.restore(held)
    step.objective = objective

    assert blas.blas_threads() == threads and failing.asked == 2
    plain = make(folder, plan, 1, monkeypatch)
    assert_same(step, plain, train(step, [window] * 2), train(plain, [window] * 2))


def test_few_rows_are_left_to_the_threads_of_a_product(folder, plan, monkeypatch):
    step = make(folder, plan, 6, monkeypatch)
    counts = {rows: step._count({"input_ids": mx.zeros((rows, 4))}) for rows in (1, 3, 4, 6, 9)}

    assert counts == {1: 1, 3: 1, 4: 4, 6: 6, 9: 6}


def test_the_lanes_are_the_threads_of_openblas(monkeypatch):
    if blas.blas_threads() is None:
        pytest.skip("OpenBLAS is not loaded here")
    assert count_lanes() == blas.blas_threads()
    with blas.single_threaded_blas():
        assert count_lanes() == 1
    monkeypatch.setattr(lanes.sys, "platform", "darwin")
    assert count_lanes() == 1
