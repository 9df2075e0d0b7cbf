"""Updates of large arrays, whose gradients are begun in stages: the same numbers, and nothing lost where one fails."""

from dataclasses import replace
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tiny_checkpoints import write_llama

from hf_mlx.data.collate import collate
from hf_mlx.models.load import load_model
from hf_mlx.recipes.sft import SFT
from hf_mlx.session import Session
from hf_mlx.settings.plan import CheckpointingPlan, OptimPlan
from hf_mlx.settings.resolve import resolve_plan
from hf_mlx.training.backward_order import gradient_stages
from hf_mlx.training.bundles import LARGEST, Bundles
from hf_mlx.training.inputs import make_inputs

STEPS, RATE = 4, 0.01
# Numbers of an array that is large here: those of queries and of the feed-forward network are, those of keys are not.
LARGE = 800
OPTIMIZERS = {
    "adamw": OptimPlan(name="adamw", weight_decay=0.1, adam_epsilon=1e-4),
    "sgd": OptimPlan(name="sgd", options={"momentum": 0.9}),
}


@pytest.fixture(scope="module", params=[1, 9], ids="{} blocks".format)
def folder(request, tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("llama"), num_hidden_layers=request.param)


def plan_of(**settings):
    given = {"output_dir": "unused", "gradient_checkpointing": False, "bf16": False}
    return resolve_plan({**given, **settings})[0]


def windows_of(micro_batches):
    draw = np.random.default_rng(0)
    rows = [[draw.integers(3, 64, 12).tolist() for _ in range(micro_batches)] for _ in range(STEPS)]
    return [[make_inputs(collate([{"input_ids": ids}], pad_token_id=0), 0) for ids in window] for window in rows]


def step_of(folder, plan, monkeypatch, large):
    """The step of a run in which arrays of more than ``large`` numbers are."""
    monkeypatch.setattr("hf_mlx.training.trained.LARGEST", large)
    session = Session(plan, load_model(folder, plan.model), SFT)
    session.loaded.model.train()
    return session.step


def train(step, windows, first=1):
    """The curve: loss and norm of each step, read once all are made."""
    made = [step(window, number, RATE) for number, window in enumerate(windows, first)]
    return np.array([[metrics.loss.item(), metrics.grad_norm.item()] for metrics in made])


def arrays_of(step):
    state = {f"{slot}.{name}": value for slot, arrays in step.state.items() for name, value in arrays.items()}
    return {name: np.array(value) for name, value in {**step.params, **state}.items()}


def assert_close(ours, theirs):
    assert ours.keys() == theirs.keys() and len(ours) >= 12
    for name, value in theirs.items():
        assert np.linalg.norm(ours[name] - value) <= 2e-6 * np.linalg.norm(value), name


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_stages_change_no_number(folder, monkeypatch, optimizer, micro_batches, checkpointing):
    plan = replace(plan_of(), optim=OPTIMIZERS[optimizer], checkpointing=CheckpointingPlan(enabled=checkpointing))
    windows = windows_of(micro_batches)
    found = {}
    for large in (LARGE, LARGEST):
        step = step_of(folder, plan, monkeypatch, large)
        found[large] = train(step, windows), arrays_of(step)
    (curve, arrays), (expected, others) = found.values()
    assert curve.shape == (STEPS, 2)
    np.testing.assert_allclose(curve, expected, rtol=2e-6)
    assert_close(arrays, others)


@pytest.mark.parametrize("settings", [{"max_grad_norm": 0.0}, {"max_grad_norm": 1e-3}], ids=["no clip", "clipped"])
def test_the_norm_is_of_all_gradients_with_and_without_a_clip(folder, monkeypatch, settings):
    curves = []
    for large in (LARGE, LARGEST):
        step = step_of(folder, replace(plan_of(**settings), optim=OPTIMIZERS["sgd"]), monkeypatch, large)
        curves.append(train(step, windows_of(1)))
    np.testing.assert_allclose(curves[0], curves[1], rtol=2e-6)
    assert (curves[0] > 0).all()


def test_arrays_can_be_read_and_loaded_between_two_steps(folder, monkeypatch):
    plan = replace(plan_of(), optim=OPTIMIZERS["adamw"])
    windows = windows_of(1)
    whole = step_of(folder, plan, monkeypatch, LARGE)
    curve = train(whole, windows)
    first = step_of(folder, plan, monkeypatch, LARGE)
    begun = train(first, windows[:2])
    second = step_of(folder, plan, monkeypatch, LARGE)
    second.load(dict(first.params), {slot: dict(arrays) for slot, arrays in first.state.items()})
    second.draws = first.draws
    assert np.array_equal(np.concatenate([begun, train(second, windows[2:], 3)]), curve)
    assert_close(arrays_of(second), arrays_of(whole))


def test_a_step_that_fails_leaves_what_was_there(folder, monkeypatch):
    plan = replace(plan_of(), optim=OPTIMIZERS["adamw"])
    windows = windows_of(1)
    expected = train(step_of(folder, plan, monkeypatch, LARGE), windows)
    begin, failed = mx.async_eval, 0
    for allowed in range(20):
        step = step_of(folder, plan, monkeypatch, LARGE)
        curve = [train(step, windows[:2])]
        left = iter(range(allowed))

        def limited(*arrays, left=left):
            if next(left, None) is None:
                raise RuntimeError("no memory is left")
            begin(*arrays)

        held = step.hold()
        monkeypatch.setattr(mx, "async_eval", limited)
        try:
            metrics = step(windows[2], 3, RATE)
        except RuntimeError:
            failed += 1
            monkeypatch.setattr(mx, "async_eval", begin)
            step.restore(held)
            curve.append(train(step, windows[2:], 3))
            assert np.array_equal(np.concatenate(curve), expected)
        else:
            monkeypatch.setattr(mx, "async_eval", begin)
            assert metrics.loss.item() == expected[2, 0]
            break
    assert failed >= 3


@pytest.mark.parametrize("blocks", [1, 3, 8, 16])
def test_each_stage_ends_with_the_largest_arrays_of_a_block(blocks, tmp_path):
    model = load_model(write_llama(tmp_path / "llama", num_hidden_layers=blocks), plan_of().model).model
    arrays = dict(tree_flatten(model.trainable_parameters()))
    alone = {name: arrays[name] for name in Bundles(arrays, (), {}, LARGE).alone}
    places = [6 * blocks // 8, 4 * blocks // 8, 3 * blocks // 8, 2 * blocks // 8]
    stages = gradient_stages(model, alone, (3 / 4, 1 / 2, 3 / 8, 1 / 4))

    assert [len(stage) > 0 for stage in stages] == [a != b for a, b in pairwise([blocks, *places])]
    named = [name for stage in stages for name in stage[::-1]]
    assert len(set(named)) == len(named)
    # From the last block down, and of each one the feed-forward network before attention.
    of_block = [int(name.split("layers.")[1].split(".")[0]) for name in named]
    assert of_block == sorted(of_block, reverse=True) and of_block[-1] == places[-1]
    for stage, place in zip(stages, places, strict=True):
        assert not stage or {name.split(f"layers.{place}.")[-1] for name in stage[:3]} == {
            f"mlp.{kind}_proj.weight" for kind in ("gate", "up", "down")
        }
