"""Optimizer steps worked out by hand, and what is refused."""

import math

import mlx.core as mx
import numpy as np
import pytest

from hf_mlx.errors import SettingError
from hf_mlx.settings.plan import OptimPlan
from hf_mlx.training.optim import OPTIMIZERS, decay_names, make_optimizer

# float32 rounds at 6e-8; a step is a handful of operations.
CLOSE = 1e-6


def _steps(plan, start, grads, lr, decay=("w",), dtype=mx.float32, scale=None):
    optimizer = make_optimizer(plan, frozenset(decay))
    params = {"w": mx.array(start, dtype)}
    state = optimizer.init(params)
    for step, grad in enumerate(grads, 1):
        hyper = {name: mx.array(value, mx.float32) for name, value in optimizer.hyper(step, lr).items()}
        params, state = optimizer.update(params, {"w": mx.array(grad, dtype)}, state, hyper, scale)
    return params["w"], state


def test_the_first_adamw_step_is_the_learning_rate_times_the_sign():
    # Without bias correction it would be 3.2 times as long.
    moved, _ = _steps(OptimPlan(), [1.0, -1.0], [[0.3, -20.0]], lr=0.01)
    assert moved.tolist() == pytest.approx([0.99, -0.99], abs=CLOSE)


def test_adamw_decays_the_weight_and_not_the_gradient():
    plan = OptimPlan(weight_decay=0.5)
    moved, state = _steps(plan, [2.0], [[0.0]], lr=0.1)
    assert moved.tolist() == pytest.approx([1.9], abs=CLOSE)
    assert state["exp_avg"]["w"].tolist() == [0.0]
    untouched, _ = _steps(plan, [2.0], [[0.0]], lr=0.1, decay=())
    assert untouched.tolist() == [2.0]


def test_a_learning_rate_of_zero_moves_nothing_but_the_state():
    moved, state = _steps(OptimPlan(weight_decay=0.1), [1.5], [[1.0]], lr=0.0)
    assert moved.tolist() == [1.5]
    assert state["exp_avg"]["w"].tolist() == pytest.approx([0.1], abs=CLOSE)


def test_bias_corrections_are_doubles():
    hyper = make_optimizer(OptimPlan(), frozenset()).hyper(1000, 1e-4)
    assert hyper["correction"] == math.sqrt(1 - 0.999**1000)
    assert hyper["step_size"] == 1e-4 / (1 - 0.9**1000)


def test_sgd_momentum_takes_the_first_gradient_whole():
    plan = OptimPlan("sgd", options={"momentum": 0.5, "dampening": 0.5})
    moved, state = _steps(plan, [0.0], [[1.0], [1.0]], lr=1.0)
    assert state["momentum_buffer"]["w"].tolist() == [1.0]
    assert moved.tolist() == [-2.0]


def test_adagrad_divides_by_the_root_of_the_sum():
    moved, state = _steps(OptimPlan("adagrad"), [0.0], [[3.0], [4.0]], lr=1.0)
    assert state["sum"]["w"].tolist() == [25.0]
    assert moved.tolist() == pytest.approx([-1.8], abs=CLOSE)


def test_rmsprop_first_step():
    moved, _ = _steps(OptimPlan("rmsprop"), [0.0], [[5.0]], lr=0.01)
    assert moved.tolist() == pytest.approx([-0.1], abs=CLOSE)


def test_adafactor_keeps_rows_and_columns_of_a_matrix():
    moved, state = _steps(OptimPlan("adafactor"), np.zeros((3, 5)), [np.ones((3, 5))], lr=0.1)
    assert {slot: arrays["w"].shape for slot, arrays in state.items()} == {
        "exp_avg_sq_row": (3,),
        "exp_avg_sq_col": (5,),
    }
    assert np.array(moved) == pytest.approx(np.full((3, 5), -0.1), abs=CLOSE)


def test_lion_follows_bitsandbytes():
    # bitsandbytes 0.50.2, optim.Lion, betas (0.9, 0.95), weight decay 0.1
    plan = OptimPlan("lion", weight_decay=0.1, adam_beta2=0.95)
    grads = [[0.1, -0.2, 0.3], [-0.9, 0.05, -0.4], [0.2, 0.2, -0.2]]
    moved, state = _steps(plan, [0.5, -0.25, 1.0], grads, lr=0.01)
    assert moved.tolist() == pytest.approx([0.508511483669281, -0.23928074538707733, 1.0070130825042725], abs=CLOSE)
    expected = [-0.02823750115931034, 0.0033499998971819878, -0.015462500974535942]
    assert state["state1"]["w"].tolist() == pytest.approx(expected, abs=CLOSE)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_scale_is_a_factor_on_the_gradients(name):
    scaled, _ = _steps(OptimPlan(name), [[1.0, 2.0]], [[[4.0, -8.0]]], lr=0.1, scale=mx.array(0.25))
    plain, _ = _steps(OptimPlan(name), [[1.0, 2.0]], [[[1.0, -2.0]]], lr=0.1)
    assert scaled.tolist() == plain.tolist()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_compiled_equals_eager_and_traces_once(name):
    optimizer = make_optimizer(OptimPlan(name, weight_decay=0.1), frozenset({"w"}))
    traces = []

    def update(*arguments):
        traces.append(1)
        return optimizer.update(*arguments)

    compiled = mx.compile(update)
    eager = jitted = ({"w": mx.ones((4, 3))}, optimizer.init({"w": mx.ones((4, 3))}))
    for step in range(1, 6):
        grads = {"w": mx.random.normal((4, 3), key=mx.random.key(step))}
        hyper = {key: mx.array(value, mx.float32) for key, value in optimizer.hyper(step, 0.1 / step).items()}
        eager = optimizer.update(eager[0], grads, eager[1], hyper)
        jitted = compiled(jitted[0], grads, jitted[1], hyper)
    assert np.array(jitted[0]["w"]) == pytest.approx(np.array(eager[0]["w"]), abs=CLOSE)
    assert len(traces) == 1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bfloat16_parameters_stay_bfloat16(name):
    moved, state = _steps(OptimPlan(name), [[1.0, 2.0]], [[[0.5, 0.5]]], lr=0.1, dtype=mx.bfloat16)
    assert moved.dtype == mx.bfloat16
    wide = {"adafactor", "lion"}
    dtypes = {array.dtype for arrays in state.values() for array in arrays.values()}
    assert dtypes <= {mx.float32 if name in wide else mx.bfloat16}


def test_decay_spares_biases_and_norms_only():
    decaying = {
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.lora_A.default.weight",
        "model.layers.0.self_attn.q_proj.lora_magnitude_vector.default.weight",
        "model.normalizer.weight",
    }
    spared = {
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.q_proj.lora_B.default.bias",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.self_attn.q_norm.weight",
        "model.norm.weight",
        "h.0.ln_1.weight",
    }
    assert decay_names(decaying | spared, norm_modules=["h.0.ln_1"]) == decaying


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (OptimPlan("adam"), "one of adamw, sgd"),
        (OptimPlan("adamw", options={"momentum": 0.9}), "momentum"),
        (OptimPlan("sgd", options={"momentum": -0.9}), "numbers >= 0"),
        (OptimPlan("sgd", options={"nesterov": True}), "nesterov needs a momentum"),
    ],
)
def test_an_optimizer_that_cannot_be_made_is_refused(plan, message):
    with pytest.raises(SettingError, match=message):
        make_optimizer(plan, frozenset())
