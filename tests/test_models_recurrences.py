"""Recurrences in chunks: the same outputs and gradients as one token after the other, at every length and decay."""

from __future__ import annotations

import re
from functools import partial

import mlx.core as mx
import pytest
from peaks import peak_of

from hf_mlx.models.overrides.linear_recurrence import linear_recurrence
from hf_mlx.models.overrides.selective_scan import selective_scan
from hf_mlx.models.overrides.triangular import unit_lower_inverse

# float32 with another order of summation, relative to the largest value.
TOLERANCE = 1e-5

# batch, tokens, key heads, value heads, key width, value width, decay by channel, delta rule, decay of a token up to
CASES = {
    "one token": (1, 1, 1, 1, 8, 8, False, True, 1.0),
    "shorter than a chunk": (2, 7, 1, 2, 8, 4, False, True, 1.0),
    "exactly two chunks": (1, 128, 2, 2, 8, 8, False, True, 1.0),
    "part of a chunk, heads share keys": (2, 75, 2, 4, 8, 4, False, True, 1.0),
    "by channel": (1, 75, 2, 2, 8, 8, True, True, 1.0),
    "by channel, forgets at once": (1, 75, 1, 2, 8, 8, True, True, 40.0),
    "hardly decays": (1, 75, 1, 1, 8, 8, False, True, 1e-3),
    "state space": (2, 75, 1, 4, 8, 8, False, False, 1.0),
    "state space, exactly a chunk": (1, 64, 2, 2, 4, 8, False, False, 5.0),
}


def one_by_one(q, k, v, g, beta=None):
    """The definition."""
    shared = v.shape[2] // k.shape[2]
    q, k = mx.repeat(q, shared, axis=2), mx.repeat(k, shared, axis=2)
    g = g[..., None] if g.ndim == 3 else g
    state, outputs = mx.zeros((*v.shape[:1], *v.shape[2:3], k.shape[-1], v.shape[-1])), []
    for t in range(v.shape[1]):
        state = mx.exp(g[:, t])[..., None] * state
        news = v[:, t]
        if beta is not None:
            news = beta[:, t, :, None] * (news - (k[:, t, :, :, None] * state).sum(axis=-2))
        state = state + k[:, t, :, :, None] * news[:, :, None]
        outputs.append((q[:, t, :, :, None] * state).sum(axis=-2))
    return mx.stack(outputs, axis=1)


def scan_one_by_one(x, delta, a, b, c):
    """The definition."""
    state, outputs = mx.zeros((x.shape[0], *a.shape)), []
    for t in range(x.shape[1]):
        state = mx.exp(delta[:, t, :, None] * a) * state + (delta[:, t] * x[:, t])[..., None] * b[:, t, None]
        outputs.append((state * c[:, t, None]).sum(axis=-1))
    return mx.stack(outputs, axis=1)


def check(form, definition, inputs, outputs_like):
    weights = mx.random.normal(outputs_like.shape)
    results = []
    for function in (form, definition):
        weighted = lambda *x, function=function: (function(*x) * weights).sum()  # noqa: E731
        results.append([function(*inputs), *mx.grad(weighted, argnums=list(range(len(inputs))))(*inputs)])
    for ours, theirs in zip(*results, strict=True):
        assert ours.shape == theirs.shape
        assert mx.isfinite(ours).all()
        assert (mx.abs(ours - theirs).max() <= TOLERANCE * (1e-3 + mx.abs(theirs).max())).item()
    return len(results[0])


@pytest.mark.parametrize("name", CASES)
def test_chunks_are_one_token_after_the_other(name):
    batch, tokens, groups, heads, keys, values, by_channel, delta, largest = CASES[name]
    mx.random.seed(len(name))
    # Keys with a common part, as neighbours have.
    k = mx.random.normal((batch, tokens, groups, keys)) + 1
    k = k / mx.linalg.norm(k, axis=-1, keepdims=True)
    q, v = mx.random.normal((batch, tokens, groups, keys)), mx.random.normal((batch, tokens, heads, values))
    g = -largest * mx.random.uniform(shape=(batch, tokens, heads, keys) if by_channel else (batch, tokens, heads))
    inputs = [q, k, v, g, *([2 * mx.random.uniform(shape=(batch, tokens, heads))] if delta else [])]

    assert check(linear_recurrence, one_by_one, inputs, v) == len(inputs) + 1


@pytest.mark.parametrize("tokens", [1, 16, 37, 256, 300])
def test_a_scan_in_segments_is_one_token_after_the_other(tokens):
    mx.random.seed(tokens)
    x, delta = mx.random.normal((2, tokens, 4)), mx.random.uniform(shape=(2, tokens, 4))
    b, c = mx.random.normal((2, tokens, 3)), mx.random.normal((2, tokens, 3))
    inputs = [x, delta, -3 * mx.random.uniform(shape=(4, 3)), b, c]

    assert check(selective_scan, scan_one_by_one, inputs, x) == 6


def test_the_inverse_of_keys_that_are_all_alike():
    """Where a series of powers would need binomial(64, 32) to cancel."""
    ones = mx.tril(mx.ones((64, 64)), -1)

    inverse = unit_lower_inverse(ones)

    assert mx.array_equal(inverse, mx.eye(64) - mx.eye(64, k=-1))


def test_memory_grows_with_the_tokens_and_no_faster():
    peaks = []
    for tokens in (256, 4096):
        inputs = [mx.random.normal((1, tokens, 2, 16)) for _ in range(3)]
        inputs += [-mx.random.uniform(shape=(1, tokens, 2)), mx.random.uniform(shape=(1, tokens, 2))]
        mx.eval(inputs)
        peaks.append(peak_of(partial(mx.grad(lambda *x: linear_recurrence(*x).sum(), argnums=list(range(5))), *inputs)))

    assert peaks[1] < 1.2 * 16 * peaks[0]


def test_a_gpu_compiles_few_kernels_and_starts_few_operations_a_chunk(tmp_path):
    """Each kernel is a second or more before the first step on CUDA, each operation some microseconds of every step."""
    operations = {}
    for chunks in (4, 16):
        inputs = [mx.random.normal((1, 64 * chunks, 2, 16)) for _ in range(3)]
        inputs += [-mx.random.uniform(shape=(1, 64 * chunks, 2)), mx.random.uniform(shape=(1, 64 * chunks, 2))]
        mx.eval(inputs)
        gradients = mx.compile(mx.grad(lambda *x: linear_recurrence(*x).sum(), argnums=list(range(5))))(*inputs)
        mx.export_to_dot(str(tmp_path / "graph.dot"), *gradients)
        operations[chunks] = re.findall(r'label ="(\w+)", shape=rectangle', (tmp_path / "graph.dot").read_text())

    assert len({name for name in operations[16] if name.startswith("Compiled")}) <= 10
    # A product and two views of what it reads, there and back.
    assert (len(operations[16]) - len(operations[4])) / 12 <= 8
    assert len(operations[4]) < 250
