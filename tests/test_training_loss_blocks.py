"""The cross-entropy in blocks against the same loss over all logits at once: sums, and every gradient."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from hf_mlx.models.heads import Head
from hf_mlx.settings.plan import LossPlan
from hf_mlx.training import linear_cross_entropy
from hf_mlx.training.linear_cross_entropy import block_rows, linear_token_sums
from hf_mlx.training.loss import token_sums

TOKENS, HIDDEN, VOCABULARY = 70, 64, 160
# fp32 sums of the same numbers in another order.
CLOSE = 1e-6

LOSSES = {
    "nll": LossPlan(),
    "dft": LossPlan(kind="dft"),
    "smoothed": LossPlan(label_smoothing_factor=0.1),
}
HEADS = {
    "plain": {},
    "multiplier": {"multiplier": 0.25},
    "divisor": {"divisor": 8.0},
    "softcap": {"softcap": 3.0},
    "all": {"multiplier": 1.5, "divisor": 2.0, "softcap": 5.0},
}


class Model(nn.Module):
    """A head alone: ``lm_head`` with a bias, or a tied embedding."""

    def __init__(self, *, tied=False, bits=None):
        super().__init__()
        self.tied = tied
        self.lm_head = nn.Embedding(VOCABULARY, HIDDEN) if tied else nn.Linear(HIDDEN, VOCABULARY, bias=True)
        if not tied:
            self.lm_head.bias = mx.random.normal((VOCABULARY,), key=mx.random.key(3))
        self.lm_head.weight = mx.random.normal((VOCABULARY, HIDDEN), key=mx.random.key(4)) / 4
        if bits:
            nn.quantize(self, group_size=32, bits=bits)


def batch(seed=0):
    draw = np.random.default_rng(seed)
    targets = draw.integers(0, VOCABULARY, TOKENS)
    targets[draw.random(TOKENS) < 0.3] = -100
    return mx.array(draw.standard_normal((TOKENS, HIDDEN)).astype(np.float32)), mx.array(targets.astype(np.int32))


def run(model, head, plan, hidden, targets, names, rows, compiled=False):
    """Sums, and gradients of a scaled loss by hidden and by each named array of the head."""
    values = [model.lm_head[name] for name in names]

    def project(hidden, weights):
        for name, weight in zip(names, weights, strict=True):
            model.lm_head[name] = weight
        return head.project(model, hidden)

    def loss(inputs):
        hidden, *weights = inputs
        if rows is None:
            sums = token_sums(head.finish(project(hidden, weights)), targets, plan)
        else:
            sums = linear_token_sums(project, hidden, weights, targets, plan, rows=rows, finish=head.finish)
        return sums.loss / 7, sums

    step = mx.value_and_grad(loss)
    (_, sums), grads = (mx.compile(step) if compiled else step)([hidden, *values])
    mx.eval(sums, grads)
    for name, value in zip(names, values, strict=True):
        model.lm_head[name] = value
    return sums, grads


def assert_equal(plain, blocks):
    for name in ("loss", "entropy", "correct"):
        expected = getattr(plain[0], name).item()
        assert getattr(blocks[0], name).item() == pytest.approx(expected, rel=CLOSE), name
    assert len(plain[1]) == len(blocks[1])
    for expected, gradient in zip(plain[1], blocks[1], strict=True):
        scale = mx.abs(expected).max().item()
        assert gradient.dtype == expected.dtype
        assert mx.abs(gradient - expected).max().item() <= CLOSE * max(scale, 1.0)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("extras", HEADS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_blocks_equal_the_whole(loss, extras, tied):
    model, head = Model(tied=tied), Head("lm_head", tied=tied, **HEADS[extras])
    hidden, targets = batch()
    names = ["weight"] if tied else ["weight", "bias"]

    plain = run(model, head, LOSSES[loss], hidden, targets, names, None)
    # The last block is shorter than the others.
    blocks = run(model, head, LOSSES[loss], hidden, targets, names, 16)

    assert plain[0].loss.item() > 0
    assert_equal(plain, blocks)


@pytest.mark.parametrize("extras", HEADS)
@pytest.mark.parametrize("rows, larger", [(8, 32), (16, 32), (TOKENS, TOKENS)])
def test_larger_blocks_of_a_trained_head_equal_the_whole(extras, rows, larger, monkeypatch):
    model, head = Model(tied=True), Head("lm_head", tied=True, **HEADS[extras])
    hidden, targets = batch(2)
    plain = run(model, head, LossPlan(), hidden, targets, ["weight"], None)

    # As on a GPU: half as many as the hidden states are wide, and at the end the other 6; or all at once.
    monkeypatch.setattr(linear_cross_entropy, "on_cpu", lambda: False)
    assert linear_cross_entropy.trained_rows(rows, TOKENS, 4 * VOCABULARY, [model.lm_head.weight]) == larger
    assert_equal(plain, run(model, head, LossPlan(), hidden, targets, ["weight"], rows, compiled=True))


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_frozen_head_quantised_or_not_gives_the_gradient_of_hidden(bits, tied):
    model, head = Model(tied=tied, bits=bits), Head("lm_head", tied=tied)
    hidden, targets = batch(1)

    assert_equal(
        run(model, head, LossPlan(), hidden, targets, [], None),
        run(model, head, LossPlan(), hidden, targets, [], 32, compiled=True),
    )


def test_a_batch_without_a_trained_token_has_zero_loss_and_zero_gradient():
    model, head = Model(), Head("lm_head", tied=False)
    hidden, _ = batch()
    nothing = mx.full((TOKENS,), -100, mx.int32)

    sums, grads = run(model, head, LossPlan(), hidden, nothing, ["weight"], 16)

    assert sums.loss.item() == sums.entropy.item() == sums.correct.item() == 0
    assert [mx.abs(g).max().item() for g in grads] == [0, 0]


def test_evaluation_gives_the_same_sums_without_gradients():
    model, head = Model(), Head("lm_head", tied=False)
    hidden, targets = batch()

    def project(hidden, weights):
        return head(model, hidden)

    sums = linear_token_sums(project, hidden, [], targets, LossPlan(), rows=16, gradient=False)
    plain = token_sums(head(model, hidden), targets, LossPlan())

    for ours, expected in zip(sums, plain, strict=True):
        assert ours.item() == pytest.approx(expected.item(), rel=CLOSE)


@pytest.mark.parametrize(
    "tokens, vocabulary, rows",
    [
        (512, 32_000, 512),
        (8192, 4096, 8192),
        (8192, 49_152, 512),
        (8192, 151_936, 256),
        (8192, 262_144, 256),
        (100, 262_144, 100),
    ],
)
def test_a_block_holds_few_logits_but_not_too_few_rows(tokens, vocabulary, rows):
    assert block_rows(tokens, vocabulary) == rows
