"""Products with frozen weights: the numbers of the plain layer, by fewer operations."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from hf_mlx.adapters.layers import LoRALinear
from hf_mlx.adapters.low_rank import add_low_rank
from hf_mlx.models import sums
from hf_mlx.models.frozen_products import FrozenLinear, turn_frozen_weights
from hf_mlx.models.precision import CastLinear


class Model(nn.Module):
    def __init__(self, bias, dtype=mx.float32):
        super().__init__()
        mx.random.seed(2)
        self.layer = CastLinear(nn.Linear(24, 40, bias=bias), dtype)
        self.layer.weight = self.layer.weight.astype(dtype)
        self.freeze()


def derive(model, x, *, compiled):
    function = mx.value_and_grad(lambda x: mx.square(model.layer(x).astype(mx.float32)).sum())
    return (mx.compile(function) if compiled else function)(x)


def operations(function, *args, path):
    mx.export_to_dot(str(path), *(value for _, value in tree_flatten(mx.compile(function)(*args))))
    return path.read_text(encoding="utf-8").count("[label =")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24)])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_values_and_gradients_are_those_of_the_plain_layer(dtype, shape, bias):
    plain, turned = Model(bias, dtype), Model(bias, dtype)
    turn_frozen_weights(turned)
    x = mx.random.normal(shape).astype(dtype)

    for compiled in (True, False):
        for expected, found in zip(
            derive(plain, x, compiled=compiled), derive(turned, x, compiled=compiled), strict=True
        ):
            assert found.dtype == expected.dtype and mx.array_equal(found, expected)
    assert [name for name, _ in tree_flatten(turned.parameters())] == [
        name for name, _ in tree_flatten(plain.parameters())
    ]
    assert isinstance(turned.layer, CastLinear)


@pytest.mark.parametrize(
    "dtype, on_cpu, most", [(mx.float32, True, 5e-7), (mx.bfloat16, True, 2**-8), (mx.bfloat16, False, 2**-8)]
)
def test_a_bias_that_trains_alone_gets_all_that_it_is_added_to(dtype, on_cpu, most, monkeypatch):
    monkeypatch.setattr(sums, "on_cpu", lambda: on_cpu)
    model = Model(True, dtype)
    model.layer.unfreeze(keys="bias", recurse=False)
    x, by_out = (mx.random.normal((2, 700, width)).astype(dtype) + 1 for width in (24, 40))

    def derive():
        def out(bias, x):
            model.layer.bias = bias
            return model.layer(x)

        (value,), (by_bias, by_x) = mx.compile(lambda bias, x: mx.vjp(out, [bias, x], [by_out]))(bias, x)
        model.layer.bias = bias
        return by_bias, value, by_x

    bias = mx.random.normal((40,))
    _, *expected = derive()
    turn_frozen_weights(model)
    by_bias, *found = derive()

    assert isinstance(model.layer, FrozenLinear) and model.layer.bias.dtype == by_bias.dtype == mx.float32
    assert all(mx.array_equal(*pair) for pair in zip(found, expected, strict=True)) and len(found) == 2
    exact = np.array(by_out.astype(mx.float32), np.float64).sum(axis=(0, 1))
    assert np.abs(np.array(by_bias) - exact).max() <= most * np.abs(exact).max()


def test_another_weight_is_the_one_that_multiplies():
    plain, turned = Model(False), Model(False)
    turn_frozen_weights(turned)
    plain.layer.weight = turned.layer.weight = mx.random.normal((40, 24))
    x = mx.random.normal((3, 24))

    assert mx.array_equal(turned.layer(x), plain.layer(x))


def test_a_trained_weight_stays_as_it_is():
    model = Model(True)
    model.unfreeze()
    turn_frozen_weights(model)

    assert type(model.layer) is CastLinear


def test_an_adapted_layer_is_few_operations(tmp_path):
    model = Model(False)
    adapter = LoRALinear(model.layer, 4, 0.3)
    x, a, b = mx.random.normal((2, 8, 24)), adapter.lora_A, mx.random.normal(adapter.lora_B.shape)

    mx.eval(model.parameters(), x, a, b)

    def loss(x, a, b):
        return add_low_rank(model.layer, x, a, b, 0.3).sum()

    counts = []
    for turn in (False, True):
        if turn:
            turn_frozen_weights(model)
        counts.append(operations(mx.value_and_grad(loss, argnums=(0, 1, 2)), x, a, b, path=tmp_path / "graph.dot"))
    # Four products forwards and backwards with their sums, four turns, the rows, and the sum with its gradient.
    assert counts[1] <= 27 and counts[0] - counts[1] == 2
