"""Log-probabilities in blocks: values and gradients are those of all logits at once."""

from __future__ import annotations

from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from peaks import peak_of

from hf_mlx.training import exponential, linear_logps, sums
from hf_mlx.training.linear_logps import linear_logp, linear_token_logps, token_logps
from hf_mlx.training.loss import IGNORED
from hf_mlx.training.sums import sum_in_pieces

TOKENS, WIDTH, VOCABULARY = 37, 12, 300


@pytest.fixture
def problem():
    rng = np.random.default_rng(3)
    hidden = mx.array(rng.normal(size=(TOKENS, WIDTH)).astype(np.float32))
    weight = mx.array(rng.normal(size=(VOCABULARY, WIDTH)).astype(np.float32))
    targets = rng.integers(0, VOCABULARY, TOKENS).astype(np.int32)
    targets[::5] = IGNORED
    return hidden, weight, mx.array(targets), mx.array(rng.normal(size=TOKENS).astype(np.float32))


@pytest.fixture(params=["cpu", "gpu"])
def device(request, monkeypatch):
    """The way of a GPU goes through MLX's fused cross-entropy and sums in pieces, which the CPU computes too."""
    monkeypatch.setattr(linear_logps, "on_cpu", lambda: request.param == "cpu")
    # Pieces of 16 and a rest.
    monkeypatch.setattr(linear_logps, "sum_in_pieces", partial(sum_in_pieces, least=1))
    monkeypatch.setattr(sums, "ALIGNMENT", 8)


@pytest.mark.parametrize("trains_head", [False, True])
@pytest.mark.parametrize("rows", [8, 16, TOKENS])
def test_blocks_equal_the_whole(problem, device, rows, trains_head):
    hidden, weight, targets, cotangents = problem

    def whole(hidden, weight):
        values = token_logps(hidden @ weight.T, targets, squares=True)
        return (values.logp * cotangents).sum(), values

    def blocked(hidden, weight):
        project = (lambda h, w: h @ w[0].T) if trains_head else (lambda h, w: h @ weight.T)
        values = linear_token_logps(project, hidden, [weight] if trains_head else [], targets, rows=rows, squares=True)
        return (values.logp * cotangents).sum(), values

    which = [0, 1] if trains_head else 0
    (_, want), want_grad = mx.value_and_grad(whole, argnums=which)(hidden, weight)
    (_, got), got_grad = mx.compile(mx.value_and_grad(blocked, argnums=which))(hidden, weight)
    for name, a, b in zip(want._fields, want, got, strict=True):
        np.testing.assert_allclose(np.array(b), np.array(a), rtol=1e-5, atol=1e-5, err_msg=name)
    for a, b in zip(*((x if trains_head else [x]) for x in (want_grad, got_grad)), strict=True):
        np.testing.assert_allclose(np.array(b), np.array(a), rtol=1e-4, atol=2e-5)
    assert int((np.array(targets) == IGNORED).sum()) == 8 and not np.array(got.logp)[::5].any()


def test_values_against_float64(problem, device):
    hidden, weight, targets, _ = problem
    logits = np.array(hidden, np.float64) @ np.array(weight, np.float64).T
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    got = linear_token_logps(lambda h, w: h @ weight.T, hidden, [], targets, rows=8, gradient=False, squares=True)
    scored = np.flatnonzero(np.array(targets) != IGNORED)
    chosen = np.array(targets)[scored]
    want = {
        "logp": np.log(p[scored, chosen]),
        "entropy": -(p * np.log(p)).sum(1)[scored],
        "mean_logit": logits.mean(1)[scored],
        "correct": logits.argmax(1)[scored] == chosen,
        "log_square_sum": np.log((p**2).sum(1))[scored],
    }
    alone = linear_logp(lambda h, w: h @ weight.T, hidden, [], targets, rows=8)
    assert np.array_equal(np.array(alone), np.array(got.logp))
    for name, value in want.items():
        np.testing.assert_allclose(np.array(getattr(got, name))[scored], value, rtol=2e-5, atol=2e-5, err_msg=name)


def test_metrics_of_a_gpu_hold_no_array_of_all_logits(monkeypatch):
    """What a fused cross-entropy leaves to be computed beside it: less than the logits' own 2 bytes each."""
    logits = mx.random.normal((64, 1 << 15), key=mx.random.key(1)).astype(mx.bfloat16)
    targets = mx.arange(64)
    mx.eval(logits, targets)
    for module in (linear_logps, exponential):
        monkeypatch.setattr(module, "on_cpu", lambda: False)
    monkeypatch.setattr(linear_logps, "sum_in_pieces", partial(sum_in_pieces, least=1))
    monkeypatch.setattr(mx.fast, "cross_entropy", lambda logits, targets: targets.astype(mx.float32))
    of_logits = mx.compile(partial(token_logps, squares=True))

    assert peak_of(partial(of_logits, logits, targets)) / logits.size <= 1
