"""The fused low-rank sum against the same formula written out, forwards and backwards."""

import mlx.core as mx
import mlx.nn as nn
import pytest

from hf_mlx.adapters.low_rank import add_low_rank

# fp32 products in another order.
CLOSE = 1e-5


def layers():
    mx.random.seed(1)
    plain = nn.Linear(64, 96, bias=True)
    return {"plain": plain, "quantised": nn.Linear(64, 96, bias=False).to_quantized(32, 4)}


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("name", ["plain", "quantised"])
@pytest.mark.parametrize("shape", [(7, 64), (2, 5, 64)])
@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "eager"])
def test_value_and_gradients(name, scale, shape, compiled):
    layer = layers()[name]
    x, a, b = mx.random.normal(shape), mx.random.normal((4, 64)), mx.random.normal((96, 4))
    weight = mx.random.normal((*shape[:-1], 96))

    def written_out(x, a, b):
        return ((layer(x) + scale * ((x @ a.T) @ b.T)) * weight).sum()

    def fused(x, a, b):
        return (add_low_rank(layer, x, a, b, scale) * weight).sum()

    results = []
    for function in (written_out, fused):
        step = mx.value_and_grad(function, argnums=(0, 1, 2))
        results.append((mx.compile(step) if compiled else step)(x, a, b))

    (expected, expected_grads), (value, grads) = results
    assert value.item() == pytest.approx(expected.item(), rel=CLOSE)
    assert len(grads) == len(expected_grads) == 3
    for gradient, right in zip(grads, expected_grads, strict=True):
        assert mx.abs(gradient - right).max().item() <= CLOSE * mx.abs(right).max().item()
