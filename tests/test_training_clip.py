"""What each clipping rule does to the update that the compiled step applies, with gradients known by hand."""

import math
import warnings
from types import SimpleNamespace

import mlx.core as mx
import pytest

from hf_mlx import resolve_grad_clip
from hf_mlx.settings.plan import OptimPlan
from hf_mlx.training.inputs import Inputs
from hf_mlx.training.objective import TOKEN_METRICS
from hf_mlx.training.optim import make_optimizer
from hf_mlx.training.step import Step

# Gradients of a linear objective: d(3a + 4b)/da = 3, /db = 4 on the single token of the batch, so the norm is 5.
GRADIENT = {"a": 3.0, "b": 4.0}
NORM = 5.0
# fp32 arithmetic on numbers of order one.
CLOSE = 1e-6

ROWS = [
    # max_grad_value, max_grad_norm, update with lr 1 and plain SGD
    (None, 0.0, {"a": 1.0, "b": 1.0}),
    (None, None, {"a": 1.0, "b": 1.0}),
    (None, 1.0, {"a": 0.6, "b": 0.8}),
    (None, 10.0, {"a": 3.0, "b": 4.0}),
    (0.0, 0.0, {"a": 3.0, "b": 4.0}),
    (0.0, None, {"a": 3.0, "b": 4.0}),
    (0.0, 1.0, {"a": 0.6, "b": 0.8}),
    (3.5, 0.0, {"a": 3.0, "b": 3.5}),
    (5.0, None, {"a": 3.0, "b": 4.0}),
    (3.5, 1.0, {"a": 3.0, "b": 3.5}),
]


class Linear:
    """An objective with hand-made gradients: loss = 3a + 4b."""

    def __init__(self):
        self.params = {"a": mx.array(0.0), "b": mx.array(0.0)}
        self.model = SimpleNamespace(parameters=dict)
        self.aux_coefficient, self.metrics, self.captured = 0.0, TOKEN_METRICS, None
        self.slots = SimpleNamespace(read=lambda: self.params, bind=lambda params: None)

    def __call__(self, params, arrays):
        loss = sum(GRADIENT[name] * params[name] for name in GRADIENT)
        return loss, dict.fromkeys(TOKEN_METRICS, mx.array(0.0))


def run_step(clip, *, micro_batches=1, compiled=True):
    step = Step(Linear(), make_optimizer(OptimPlan(name="sgd"), frozenset()), clip, compiled=compiled)
    window = [Inputs({"input_ids": mx.zeros((1, 2), mx.int32)}, valid=1, tokens=2, padding=0)] * micro_batches
    metrics = step(window, step=1, lr=1.0)
    return {name: -value.item() for name, value in step.params.items()}, metrics.grad_norm.item()


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "eager"])
@pytest.mark.parametrize("value, norm, expected", ROWS)
def test_update_and_logged_norm(value, norm, expected, compiled):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        clip = resolve_grad_clip(norm, value)
    update, grad_norm = run_step(clip, compiled=compiled)
    assert update == pytest.approx(expected, abs=CLOSE)
    # The norm that is logged is the one before clipping, whatever the rule.
    assert grad_norm == pytest.approx(NORM, abs=CLOSE)


def test_every_row_of_the_rule_was_seen():
    assert len(ROWS) == 10


def test_the_window_is_clipped_once_not_each_micro_batch():
    # Two micro-batches of one token each: the window's mean gradient is the same (3, 4).
    update, grad_norm = run_step(resolve_grad_clip(1.0, None), micro_batches=2)
    assert update == pytest.approx({"a": 0.6, "b": 0.8}, abs=CLOSE)
    assert grad_norm == pytest.approx(NORM, abs=CLOSE)


def test_norm_clip_keeps_the_direction_and_value_clip_does_not():
    by_norm, _ = run_step(resolve_grad_clip(1.0, None))
    by_value, _ = run_step(resolve_grad_clip(None, 1.0))
    assert math.isclose(by_norm["b"] / by_norm["a"], 4 / 3, rel_tol=CLOSE)
    assert math.isclose(by_value["b"] / by_value["a"], 1.0, rel_tol=CLOSE)
