"""The state of a run, out and in, without torch: moments, random states, positions, callbacks, Ctrl-C."""

import random
import signal
import sys
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tiny_checkpoints import write_llama

from hf_mlx.adapters.attach import attach
from hf_mlx.checkpoints.boundary import Boundary
from hf_mlx.checkpoints.interrupt import Interrupt
from hf_mlx.checkpoints.optimizer_state import dump_optimizer, load_optimizer
from hf_mlx.checkpoints.parameters import make_parameters
from hf_mlx.checkpoints.random_states import RandomStates
from hf_mlx.checkpoints.state_files import OPTIMIZER, RANDOM, has_state, read_state, write_state
from hf_mlx.data.generator import TorchGenerator
from hf_mlx.errors import CheckpointError
from hf_mlx.models.load import load_model
from hf_mlx.settings.plan import LoraPlan, ModelPlan, OptimPlan
from hf_mlx.training.means import Means
from hf_mlx.training.optim import make_optimizer

PLANS = {
    "adamw": OptimPlan("adamw", weight_decay=0.1),
    "sgd": OptimPlan("sgd", options={"momentum": 0.9}),
    "plain sgd": OptimPlan("sgd"),
    "adagrad": OptimPlan("adagrad"),
    "rmsprop": OptimPlan("rmsprop", options={"momentum": 0.9, "centered": True}),
    "adafactor": OptimPlan("adafactor"),
    "lion": OptimPlan("lion"),
}
NORMS = ("norm.weight", "layernorm.weight")


@pytest.fixture(params=["adapter", "model"])
def trained(request, tmp_path, monkeypatch):
    """Trained arrays and their names, from here on without torch."""
    loaded = load_model(write_llama(tmp_path / "base"), ModelPlan())
    if request.param == "adapter":
        adapter = attach(loaded, LoraPlan(r=2, target_modules=("v_proj", "q_proj", "down_proj")), seed=1)
        params = adapter.trainable()
    else:
        adapter = None
        params = dict(tree_flatten(loaded.model.parameters()))
    # transformers looks for torch when it is imported, so torch is hidden only now.
    monkeypatch.setitem(sys.modules, "torch", None)
    return params, make_parameters(adapter, loaded, list(params))


def make_step(params, plan, updates=3):
    decay = frozenset(name for name in params if not name.endswith(NORMS))
    optimizer = make_optimizer(plan, decay)
    state = optimizer.init(params)
    mx.random.seed(7)
    for step in range(1, updates + 1):
        grads = {name: mx.random.normal(value.shape) for name, value in params.items()}
        hyper = {key: mx.array(value) for key, value in optimizer.hyper(step, 1e-2).items()}
        params, state = optimizer.update(params, grads, state, hyper)
    return SimpleNamespace(params=params, state=state, optimizer=optimizer)


@pytest.mark.parametrize("name", PLANS)
def test_moments_come_back_to_the_bit(trained, tmp_path, name):
    params, parameters = trained
    step = make_step(params, PLANS[name])
    tree, _ = dump_optimizer(step, parameters, PLANS[name], lr=1e-3, base_lr=1e-2, updates=3, fused=False)
    write_state(tree, tmp_path, OPTIMIZER)
    assert has_state(tmp_path, OPTIMIZER) and not list(tmp_path.glob("*.pt"))
    state, updates = load_optimizer(read_state(tmp_path, OPTIMIZER), step, parameters, PLANS[name], tmp_path)
    assert updates in (3, None)
    assert state.keys() == step.state.keys()
    compared = 0
    for slot, held in step.state.items():
        for key, value in held.items():
            assert np.array_equal(np.array(value), np.array(state[slot][key]))
            compared += 1
    assert compared == sum(len(held) for held in step.state.values())
    assert compared or name == "plain sgd"


def test_ids_run_through_pefts_order(trained, tmp_path):
    params, parameters = trained
    order = parameters.order()
    if order is None:
        # Without torch only names are certain for a whole model.
        tree, by_id = dump_optimizer(
            make_step(params, PLANS["adamw"]), parameters, PLANS["adamw"], lr=1, base_lr=1, updates=3, fused=False
        )
        assert not by_id and all(isinstance(key, str) for key in tree["state"])
        return
    layers = ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"]
    expected = [
        f"base_model.model.model.layers.{i}.{layer}.lora_{leaf}.weight"
        for i in (0, 1)
        for layer in layers
        for leaf in "AB"
    ]
    assert order == expected


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (OptimPlan("adamw", weight_decay=0.2), "weight_decay=0.1 in the checkpoint, 0.2 in the arguments"),
        (OptimPlan("adamw", weight_decay=0.1, adam_beta2=0.95), "betas"),
        (OptimPlan("sgd", weight_decay=0.1), "another optimizer"),
    ],
)
def test_other_settings_than_the_moments_were_made_with_are_refused(trained, tmp_path, plan, message):
    params, parameters = trained
    step = make_step(params, PLANS["adamw"])
    tree, _ = dump_optimizer(step, parameters, PLANS["adamw"], lr=1e-3, base_lr=1e-2, updates=3, fused=True)
    with pytest.raises(CheckpointError, match=message):
        load_optimizer(tree, step, parameters, plan, tmp_path)


@pytest.mark.parametrize("kind", ["a group", "a slot", "a parameter", "a shape", "a step"])
def test_a_state_that_does_not_fit_is_refused(trained, tmp_path, kind):
    params, parameters = trained
    step = make_step(params, PLANS["adamw"])
    tree, _ = dump_optimizer(step, parameters, PLANS["adamw"], lr=1e-3, base_lr=1e-2, updates=3, fused=True)
    key = next(iter(tree["state"]))
    if kind == "a group":
        tree["param_groups"].pop()
    elif kind == "a slot":
        tree["state"][key]["max_exp_avg_sq"] = mx.zeros((1,))
    elif kind == "a parameter":
        del tree["state"][key]
    elif kind == "a shape":
        tree["state"][key]["exp_avg"] = mx.zeros((3, 3))
    else:
        tree["state"][key]["step"] = mx.array(9.0)
    with pytest.raises(CheckpointError):
        load_optimizer(tree, step, parameters, PLANS["adamw"], tmp_path)


def draws(generator):
    return mx.random.uniform(shape=(3,)).tolist(), random.random(), np.random.rand(), generator.randperm(9).tolist()


def test_random_states_go_on_where_they_were(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    generator = TorchGenerator(3)
    draws(generator)
    states = RandomStates.capture(generator)
    expected = draws(generator)
    tree = states.to_tree()
    write_state(states.to_hf(), tmp_path, RANDOM)
    mx.random.seed(0)
    random.seed(0)
    np.random.seed(0)
    other = TorchGenerator(99)
    RandomStates.from_files(read_state(tmp_path, RANDOM), tree).restore(other)
    assert draws(other) == expected


def test_a_position_of_another_library_is_upstreams_arithmetic():
    state = {"global_step": 17, "log_history": [{"num_tokens": 90.0}, {"num_tokens": 120.0}, {"eval_loss": 1.0}]}
    boundary = Boundary.from_hf(state, (5, 4, 2), RandomStates.capture(TorchGenerator(0)))
    assert (boundary.epoch, boundary.update, boundary.progress["num_tokens"]) == (3, 2, 120)


def test_a_boundary_comes_back():
    step = {"loss": mx.array(1 / 3), "grad_norm": mx.array(2.0), "entropy": mx.array(0.1), "micro_batches": 4}
    states = RandomStates.capture(TorchGenerator(0))
    boundary = Boundary(2, 1, (5, 4, 2), 10, {"num_tokens": 7}, states, due=("evaluate",), pending=[step], draws=48)
    again = Boundary.from_tree(boundary.to_tree(), states)
    # float32 as a double is exact.
    assert again.pending == [{k: v.item() if isinstance(v, mx.array) else v for k, v in step.items()}]
    assert (again.epoch, again.update, again.due, again.draws) == (2, 1, ("evaluate",), 48)


def test_a_boundary_written_before_metrics_had_names_is_read():
    states = RandomStates.capture(TorchGenerator(0))
    measured = {name: mx.array(1.0) for name in ("loss", "entropy", "accuracy", "micro_batches", "aux_loss")}
    means = {"entropy": 3.0, "accuracy": 1.5, "micro_batches": 2, "aux_loss": None}
    progress = {"mode": "train", "num_tokens": 7, "padding": 0, "positions": 9, "means": means}
    old = Boundary(2, 1, (5, 4, 2), 10, progress, states, carry=({"w": mx.array(0.0)}, measured))
    tree = old.to_tree() | {"pending": [[0.5, 2.0, 3.0, 1.5, 2.0, 0.0]]}
    again = Boundary.from_tree(tree, states)
    assert [again.pending[0][name] for name in ("loss", "grad_norm", "micro_batches")] == [0.5, 2.0, 2.0]
    assert [again.pending[0][name] for name in ("entropy", "mean_token_accuracy")] == [3.0, 1.5]
    assert Means(**again.progress["means"]).take() == {"entropy": 1.5, "mean_token_accuracy": 0.75}
    assert "mean_token_accuracy" in again.carry[1]


def test_ctrl_c_is_held_back_until_it_is_looked_at(capsys):
    interrupt, before = Interrupt(), signal.getsignal(signal.SIGINT)
    with interrupt.held_back():
        interrupt.check()
        signal.raise_signal(signal.SIGINT)
        reached = True
        with pytest.raises(KeyboardInterrupt):
            interrupt.check()
        interrupt.check()
    assert reached and signal.getsignal(signal.SIGINT) is before
    assert "Ctrl-C" in capsys.readouterr().err


def test_the_second_ctrl_c_is_not_held_back():
    interrupt = Interrupt()
    with pytest.raises(KeyboardInterrupt), interrupt.held_back():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_the_users_is_left_alone():
    seen = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        with Interrupt().held_back():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [signal.SIGINT]
