"""Trained layers whose gradients come in the layout of their weights, with the numbers of MLX's own backward pass."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from hf_mlx.models.precision import CastEmbedding, CastLinear
from hf_mlx.training import weight_gradients
from hf_mlx.training.weight_gradients import lay_out_gradients, look_up

LAYERS = {
    "plain": lambda: nn.Linear(12, 20, bias=False),
    "bias": lambda: nn.Linear(12, 20),
    "autocast": lambda: CastLinear(nn.Linear(12, 20), mx.bfloat16),
    "autocast, no bias": lambda: CastLinear(nn.Linear(12, 20, bias=False), mx.bfloat16),
}
HEADS = {
    "tied": lambda: nn.Embedding(20, 12),
    "tied, autocast": lambda: CastEmbedding(nn.Embedding(20, 12), mx.bfloat16),
}


class _Model(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


def _gradients(layer: nn.Module, tied: bool) -> tuple[list[mx.array], mx.array]:
    mx.random.seed(1)
    x, weights = mx.random.normal((2, 5, 12)), mx.random.normal((2, 5, 20))
    ids = mx.array([[1, 3, 1]])

    def loss(params, x):
        layer.update(params)
        out = layer.as_linear(x) if tied else layer(x)
        looked_up = (layer(ids).astype(mx.float32) ** 2).sum() if tied else 0.0
        return (mx.tanh(out.astype(mx.float32)) * weights).sum() + looked_up

    params = layer.trainable_parameters()
    value, (by_params, by_x) = mx.compile(mx.value_and_grad(loss, argnums=(0, 1)))(params, x)
    layer.update(params)
    return [*(array for _, array in tree_flatten(by_params)), by_x], value


@pytest.mark.parametrize("name", [*LAYERS, *HEADS])
def test_numbers_stay_and_gradients_are_contiguous(name):
    mx.random.seed(0)
    layer, tied = {**LAYERS, **HEADS}[name](), name in HEADS
    before, loss = _gradients(layer, tied)
    lay_out_gradients(_Model(layer))
    after, again = _gradients(layer, tied)

    assert len(before) == len(after) >= 2
    assert loss.item() == pytest.approx(again.item(), rel=1e-6)
    # bf16 products of both are rounded once; the sums are float32.
    limit = 2**-7 if "autocast" in name else 1e-6
    for old, new in zip(before, after, strict=True):
        assert new.dtype == old.dtype
        assert mx.abs(new - old).max().item() <= limit * mx.abs(old).max().item()
    weight = next(array for array in after if array.shape == (20, 12))
    assert np.array(weight, copy=False).flags.c_contiguous


def test_frozen_layers_are_left_alone():
    layer = nn.Linear(12, 20)
    layer.freeze()
    lay_out_gradients(_Model(layer))
    assert type(layer) is nn.Linear


@pytest.mark.parametrize("dtype, most", [(mx.bfloat16, 2**-8), (mx.float16, 2**-11), (mx.float32, 1e-5)])
def test_a_token_that_comes_often_learns_from_each_place_on_a_gpu(dtype, most, monkeypatch):
    monkeypatch.setattr(weight_gradients, "on_cpu", lambda: False)
    random = np.random.default_rng(0)
    tokens = np.where(random.random((2, 3000)) < 0.7, 5, random.integers(0, 40, (2, 3000)))
    rows = mx.array(random.normal(size=(2, 3000, 8)) + 1).astype(dtype)
    weight = mx.zeros((40, 8), dtype)

    @mx.compile
    def gradient(weight, rows, tokens):
        return mx.vjp(lambda weight: look_up(weight, tokens), [weight], [rows])[1][0]

    found = gradient(weight, rows, mx.array(tokens))
    exact = np.zeros((40, 8))
    np.add.at(exact, tokens.reshape(-1), np.array(rows.astype(mx.float32), np.float64).reshape(-1, 8))
    assert found.dtype == dtype
    assert exact.max() > 4000 and (np.bincount(tokens.reshape(-1), minlength=40) > 0).all()
    assert np.abs(np.array(found.astype(mx.float32)) - exact).max() <= most * np.abs(exact).max()
    apart = gradient(weight, rows[:, :3], mx.array([[7, 0, 7], [9, 7, 39]]))
    assert np.nonzero(np.array(apart.astype(mx.float32)).any(axis=-1))[0].tolist() == [0, 7, 9, 39]
