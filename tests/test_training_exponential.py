"""exp on the CPU: as exact as float32 allows, with the gradient of an exponential."""

import mlx.core as mx
import numpy as np
import pytest

from hf_mlx.training.exponential import exponential, sigmoid

# Two units in the last place of float32.
RELATIVE = 2.4e-7


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "eager"])
def test_it_is_as_exact_as_float32(compiled):
    x = -np.geomspace(1e-8, 87, 200_001).astype(np.float32)
    found = np.array((mx.compile(exponential) if compiled else exponential)(mx.array(x)))

    np.testing.assert_allclose(found, np.exp(x.astype(np.float64)), rtol=RELATIVE)


def test_what_is_far_below_zero_is_next_to_nothing_and_nan_stays():
    found = np.array(exponential(mx.array([0.0, -0.0, -88.0, -1e4, -np.inf, np.nan])))

    assert found[:2].tolist() == [1.0, 1.0]
    assert all(0 <= value < 1e-37 for value in found[2:5]) and np.isnan(found[5])


def test_its_gradient_is_itself():
    x = -mx.arange(0, 20, 0.37)
    value, gradient = mx.value_and_grad(lambda x: exponential(x).sum())(x)

    assert mx.array_equal(gradient, exponential(x)) and value.item() > 1


def test_the_sigmoid_and_its_gradient_are_as_exact():
    x = np.concatenate([-np.geomspace(1e-8, 200, 20_001), np.geomspace(1e-8, 200, 20_001)]).astype(np.float32)
    value, gradient = mx.vjp(sigmoid, [mx.array(x)], [mx.ones(x.shape)])
    exact = 1 / (1 + np.exp(-x.astype(np.float64)))

    # Where exp(x) is no normal number it is zero.
    np.testing.assert_allclose(np.array(value[0]), exact, rtol=2 * RELATIVE, atol=2e-38)
    np.testing.assert_allclose(np.array(gradient[0]), exact * (1 - exact), atol=RELATIVE)
