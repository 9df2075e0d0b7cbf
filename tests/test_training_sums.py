"""Sums as a GPU takes them, and what updates and sums hold beside their results."""

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from peaks import peak_of

from hf_mlx.settings.plan import LossPlan, OptimPlan
from hf_mlx.training import loss
from hf_mlx.training.loss import sums_and_gradient
from hf_mlx.training.optim import make_optimizer
from hf_mlx.training.sums import blocked_sum, sum_in_pieces

# float32 sums of the same numbers in another order.
CLOSE = 1e-6
NUMBERS = 1 << 21


@pytest.mark.parametrize("shape", [(5,), (200,), (1024,), (40_000,), (3, 5000), (2, 2, 2048)])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_pieces_add_up_to_the_whole(shape, dtype):
    x = mx.random.normal(shape, key=mx.random.key(1)).astype(dtype)
    exact = np.square(np.array(x.astype(mx.float32), dtype=np.float64)).sum(axis=-1)

    found = sum_in_pieces(lambda part: mx.square(part.astype(mx.float32)), x, least=1)

    assert found.dtype == mx.float32 and found.shape == shape[:-1]
    np.testing.assert_allclose(np.array(found), exact, rtol=CLOSE)


@pytest.mark.parametrize("length", [5, 64, 300, 4096, 50_257])
def test_blocks_round_nearly_as_a_tree_does(length):
    """A few units in the last place, where one term after the other is tens off; gradients are exact."""
    x = mx.random.uniform(4, 8, (40, length), key=mx.random.key(3))
    weights = mx.arange(40).astype(mx.float32)
    exact = np.array(x, dtype=np.float64).sum(axis=-1)

    found = blocked_sum(x)
    slope = mx.compile(mx.grad(lambda x: (blocked_sum(x) * weights).sum()))(x)

    assert np.abs(np.array(found, np.float64) - exact).max() <= 4 * np.spacing(exact.max().astype(np.float32))
    np.testing.assert_array_equal(np.array(slope), np.broadcast_to(np.arange(40)[:, None], x.shape))


@pytest.mark.parametrize(
    "plan", [LossPlan(), LossPlan(kind="dft"), LossPlan(label_smoothing_factor=0.1)], ids=["nll", "dft", "smoothed"]
)
def test_the_loss_of_a_gpu_is_that_of_the_cpu(plan, monkeypatch):
    # A short rest: this CPU adds it one after the other, as no GPU does.
    logits = 4 * mx.random.normal((24, 3100), key=mx.random.key(2))
    targets = mx.where(mx.arange(24) % 5 == 0, -100, mx.arange(24) * 100)
    sums, gradient = sums_and_gradient(logits, targets, plan)
    mx.eval(sums, gradient)

    monkeypatch.setattr(loss, "on_cpu", lambda: False)
    monkeypatch.setattr(loss, "sum_in_pieces", partial(sum_in_pieces, least=1))
    found, slope = sums_and_gradient(logits, targets, plan)

    for ours, expected in zip(found, sums, strict=True):
        assert ours.item() == pytest.approx(expected.item(), rel=CLOSE)
    np.testing.assert_allclose(np.array(slope), np.array(gradient), rtol=0, atol=CLOSE)


def held_beside(function: Callable[..., Any], *given: Any) -> float:
    """Bytes a number that the compiled ``function`` takes at its peak beside what it is given."""
    return peak_of(partial(mx.compile(function), *given)) / NUMBERS


def test_a_sum_of_squares_holds_a_sixteenth():
    x = mx.zeros(NUMBERS, mx.bfloat16)
    mx.eval(x)
    squares = lambda x: sum_in_pieces(lambda part: mx.square(part.astype(mx.float32)), x, least=1)  # noqa: E731
    assert held_beside(squares, x) <= 0.3


@pytest.mark.parametrize("name, states", [("adamw", 2), ("adagrad", 1), ("lion", 1), ("rmsprop", 1)])
def test_an_update_holds_its_results_alone(name, states):
    optimizer = make_optimizer(OptimPlan(name=name, learning_rate=1e-3), frozenset({"w"}))
    params = {"w": mx.ones((NUMBERS // 1024, 1024), mx.bfloat16)}
    grads, state = {"w": params["w"] * 2}, optimizer.init(params)
    hyper = {key: mx.array(value) for key, value in optimizer.hyper(2, 1e-3).items()}
    given = (params, grads, state, hyper, mx.array(0.5))
    mx.eval(given)

    assert len(state) == states
    size = sum(array.dtype.size for array in (params["w"], *(arrays["w"] for arrays in state.values())))
    assert held_beside(optimizer.update, *given) <= 1.01 * size
