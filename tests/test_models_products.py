"""Products in half precision: the numbers of fp32, rounded once, forwards and backwards."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.switch_layers import SwitchLinear

from hf_mlx.models.precision import apply_autocast, cast_for_experts
from hf_mlx.models.products import addmm, gather_mm, matmul

M, K, N = 24, 160, 40


def draw(*shape, seed=0):
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(mx.bfloat16)


def wide(x):
    return np.array(x.astype(mx.float32), np.float64)


def assert_rounded_once(got, exact):
    """``got`` is the bf16 number next to ``exact``: at most half a step of its last bit away."""
    assert got.dtype == mx.bfloat16
    half = 2.0 ** (np.frexp(exact)[1] - 9)
    # The sum itself is fp32's, here right to 1e-5.
    assert np.all(np.abs(wide(got) - exact) <= half + 1e-5)


def test_a_product_is_rounded_once():
    a, b = draw(2, M, K), draw(K, N, seed=1)
    assert_rounded_once(matmul(a, b), wide(a) @ wide(b))


def test_what_is_added_is_rounded_with_the_product():
    a, b, c = draw(M, K), draw(K, N, seed=1), draw(N, seed=2)
    assert_rounded_once(addmm(c, a, b), wide(c) + wide(a) @ wide(b))


def test_gradients_are_rounded_once():
    a, b, by_out = draw(M, K), draw(K, N, seed=1), draw(M, N, seed=2)
    _, (by_a, by_b) = mx.vjp(matmul, [a, b], [by_out])
    assert_rounded_once(by_a, wide(by_out) @ wide(b).T)
    assert_rounded_once(by_b, wide(a).T @ wide(by_out))


def test_experts_multiply_in_bf16():
    x, weight, indices = draw(M, 1, K), draw(3, K, N, seed=1), mx.arange(M)[:, None] % 3
    got = gather_mm(x[:, None], weight, rhs_indices=indices)
    exact = np.stack([wide(x)[row] @ wide(weight)[row % 3] for row in range(M)])
    assert_rounded_once(got.reshape(M, 1, N), exact)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_experts_compute_in_the_dtype_of_their_weights(dtype):
    base = SwitchLinear(K, N, 3)
    base.weight, base.bias = base.weight.astype(dtype), draw(3, N).astype(dtype)
    x, indices = draw(M, 1, 1, K).astype(mx.float32), mx.arange(M)[:, None] % 3
    cast_for_experts(base)
    got = base(x, indices)
    assert got.dtype == dtype
    exact = np.stack([wide(x)[row, 0] @ wide(base.weight)[row % 3].T + wide(base.bias)[row % 3] for row in range(M)])
    # bf16 rounds the product and then the sum; fp32 is exact to 1e-5 at this size.
    tolerance = 2**-7 if dtype == mx.bfloat16 else 1e-5
    assert np.abs(wide(got)[:, 0] - exact).max() <= tolerance * np.abs(exact).max()


def test_rotary_embeddings_are_rounded_once():
    attention = nn.Module()
    attention.rope = nn.RoPE(32)
    apply_autocast(attention, mx.bfloat16)
    x = draw(1, 2, 50, 32)
    got = attention.rope(x, offset=7)
    assert_rounded_once(got, wide(nn.RoPE(32)(x.astype(mx.float32), offset=7)))
