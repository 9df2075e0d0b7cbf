"""Small trained arrays updated end to end: each gets the numbers that it would get alone."""

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from hf_mlx import resolve_grad_clip
from hf_mlx.settings.plan import OptimPlan
from hf_mlx.training.bundles import ALIGNMENT, LARGEST, Bundles
from hf_mlx.training.inputs import Inputs
from hf_mlx.training.objective import TOKEN_METRICS
from hf_mlx.training.optim import make_optimizer
from hf_mlx.training.step import Step

OPTIMIZERS = {
    "adamw": OptimPlan(name="adamw", weight_decay=0.1),
    "sgd": OptimPlan(name="sgd", weight_decay=0.1, options={"momentum": 0.9}),
    "adagrad": OptimPlan(name="adagrad"),
    "rmsprop": OptimPlan(name="rmsprop", options={"momentum": 0.5}),
    "adafactor": OptimPlan(name="adafactor"),
    "lion": OptimPlan(name="lion", weight_decay=0.1),
}
SHAPES = {"a.weight": (3, 5), "a.bias": (5,), "scale": (), "b.weight": (64, 2), "norm.weight": (7,)}
DECAY = frozenset({"a.weight", "b.weight"})


def make_arrays(dtype=mx.float32):
    mx.random.seed(3)
    return {name: mx.random.normal(shape).astype(dtype) for name, shape in SHAPES.items()}


class Quadratic:
    """An objective whose gradients differ from element to element: the sum of (p - target)² over all arrays."""

    def __init__(self, params):
        self.model, self.aux_coefficient = SimpleNamespace(parameters=dict, layers=[]), 0.0
        self.metrics, self.captured = TOKEN_METRICS, None
        self.seen = {}
        self.bound = params
        self.slots = SimpleNamespace(read=lambda: params, bind=self.bind)

    def bind(self, params):
        self.bound = params

    def __call__(self, params, arrays):
        self.seen = {name: value.dtype for name, value in params.items()}
        targets = {name: mx.arange(value.size).reshape(value.shape) / 7 for name, value in params.items()}
        loss = sum(mx.square(value.astype(mx.float32) - targets[name]).sum() for name, value in params.items())
        return loss, dict.fromkeys(TOKEN_METRICS, mx.array(0.0))


def make_step(plan, dtype=mx.float32, **options):
    # Each optimizer has kernels of its own, which take g++ longer than the tests; one is compiled.
    options.setdefault("compiled", plan.name == "adamw" and dtype == mx.float32)
    return Step(Quadratic(make_arrays(dtype)), make_optimizer(plan, DECAY), resolve_grad_clip(1.0, None), **options)


def run(step, steps=3, micro_batches=2):
    micro = Inputs({"input_ids": mx.zeros((1, 2), mx.int32)}, valid=1, tokens=2, padding=0)
    return [step([micro] * micro_batches, number, 0.01).grad_norm.item() for number in range(1, steps + 1)]


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("plan", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_bundled_run_is_the_one_of_each_array_alone(plan, dtype, monkeypatch):
    bundled = make_step(plan, dtype)
    monkeypatch.setattr("hf_mlx.training.trained.LARGEST", 0)
    alone = make_step(plan, dtype)
    assert run(bundled) == pytest.approx(run(alone), rel=1e-6)

    assert list(bundled.params) == list(alone.params) == list(SHAPES)
    assert bundled.state.keys() == alone.state.keys()
    pairs = [(bundled.params, alone.params), *((bundled.state[slot], alone.state[slot]) for slot in alone.state)]
    compared = 0
    for ours, theirs in pairs:
        for name, value in theirs.items():
            assert ours[name].shape == value.shape and ours[name].dtype == value.dtype
            # The clip's factor is a sum in another order; a bf16 number may then round to its neighbour.
            close = 1e-6 if dtype == mx.float32 else 2**-7
            np.testing.assert_allclose(
                np.array(ours[name].astype(mx.float32)), np.array(value.astype(mx.float32)), close, close
            )
            compared += 1
    assert compared == len(SHAPES) + sum(len(arrays) for arrays in alone.state.values()) >= 5


def test_what_is_kept_is_few_arrays_and_every_array_begins_aligned():
    bundles = Bundles(make_arrays(), DECAY, {})
    packed = bundles.pack(make_arrays())

    assert {name: array.size for name, array in packed.items()} == {
        "a.weight": ALIGNMENT + 128,
        "a.bias": 3 * ALIGNMENT,
    }
    for name, array in bundles.unpack(packed).items():
        assert mx.array_equal(array, make_arrays()[name]) and array.shape == SHAPES[name]


def test_large_arrays_stay_alone():
    params = {"small": mx.zeros(8), "large": mx.zeros(LARGEST + 1), "empty": mx.zeros((0, 4))}
    packed = Bundles(params, (), {}).pack(params)

    assert packed["large"] is params["large"] and packed["small"].shape == (ALIGNMENT,) and packed["empty"].size == 0


def test_arrays_that_are_read_cast_are_cast_together_and_kept_as_they_are():
    cast = {"a.weight": mx.bfloat16, "b.weight": mx.bfloat16}
    step = make_step(OPTIMIZERS["adamw"], computed_in=lambda: cast)
    run(step)

    assert step.objective.seen == {name: cast.get(name, mx.float32) for name in SHAPES}
    assert {value.dtype for value in step.params.values()} == {mx.float32}
    assert {value.dtype for arrays in step.state.values() for value in arrays.values()} == {mx.float32}


def test_the_model_holds_what_was_trained():
    step = make_step(OPTIMIZERS["adamw"])
    before = {name: np.array(value) for name, value in step.objective.bound.items()}
    run(step)

    assert step.objective.bound is step.params
    assert all(not np.array_equal(before[name], np.array(value)) for name, value in step.params.items())


def test_gradients_that_wait_for_an_update_go_out_and_come_back_by_name():
    micro = Inputs({"input_ids": mx.zeros((1, 2), mx.int32)}, valid=1, tokens=2, padding=0)
    whole, resumed = make_step(OPTIMIZERS["adamw"]), make_step(OPTIMIZERS["adamw"])
    whole.accumulate([micro] * 2, 1)
    grads, sums = whole.carry
    assert {name: value.shape for name, value in grads.items()} == SHAPES
    resumed.carry, resumed.draws = (dict(grads), dict(sums)), whole.draws
    for step in (whole, resumed):
        step([micro], 1, 0.01)

    assert all(mx.array_equal(value, resumed.params[name]) for name, value in whole.params.items())
    assert whole.carry is None


@pytest.mark.parametrize("arrange", [reversed, sorted], ids=["reversed", "sorted"])
def test_arrays_that_are_loaded_in_another_order_are_the_same(arrange):
    plain, loaded = make_step(OPTIMIZERS["adamw"]), make_step(OPTIMIZERS["adamw"])
    for step in (plain, loaded):
        run(step, steps=2)
    traces = loaded.traces
    loaded.load(
        {name: loaded.params[name] for name in arrange(list(SHAPES))},
        {slot: {name: arrays[name] for name in arrange(list(SHAPES))} for slot, arrays in loaded.state.items()},
    )
    norms = [run(step, steps=2) for step in (plain, loaded)]

    assert norms[0] == norms[1] and list(loaded.params) == list(SHAPES)
    assert all(mx.array_equal(value, loaded.params[name]) for name, value in plain.params.items())
    assert loaded.traces == traces


def test_arrays_of_another_dtype_are_traced_anew():
    step, lowered = make_step(OPTIMIZERS["adamw"]), make_step(OPTIMIZERS["adamw"], mx.bfloat16)
    run(step)
    params = {name: value.astype(mx.bfloat16) for name, value in make_arrays().items()}
    step.load(params, step.optimizer.init(params))
    step.draws = 0

    assert run(step) == run(lowered)
    assert all(mx.array_equal(value, step.params[name]) for name, value in lowered.params.items())
