"""Norms whose gradients a GPU computes our way: the numbers of MLX's own, and in half precision close to exact ones."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from mlx_lm.models import gemma3_text

from hf_mlx.models import sums
from hf_mlx.models.cpu_norms import add_exactly
from hf_mlx.training import norm_gradients
from hf_mlx.training.norm_gradients import improve_norms

NORMS = {
    "rms": lambda: nn.RMSNorm(40),
    "rms around zero": lambda: gemma3_text.RMSNorm(40),
    "layer": lambda: nn.LayerNorm(40),
    "layer, no bias": lambda: nn.LayerNorm(40, bias=False),
    "layer, plain": lambda: nn.LayerNorm(40, affine=False),
}


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """A machine with a GPU, as far as the norms can see."""
    for module in (norm_gradients, sums):
        monkeypatch.setattr(module, "on_cpu", lambda: False)


def gradients(norm, rows, dtype):
    """Of a function of the norm's output, by its input and by what trains in it."""
    random = np.random.default_rng(1)
    x, weights = (mx.array(random.normal(size=(2, rows, 40)) + 1).astype(dtype) for _ in range(2))

    def loss(params, x):
        norm.update(params)
        return (norm(x) * weights).astype(mx.float32).sum()

    trained = norm.trainable_parameters()
    value, (by_params, by_x) = mx.compile(mx.value_and_grad(loss, argnums=(0, 1)))(trained, x)
    norm.update(trained)
    return {"loss": value, "x": by_x, **by_params}


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", NORMS)
def test_numbers_stay_in_float32(name, frozen, exact):
    norm = NORMS[name]()
    norm.update({key: mx.random.normal(value.shape, key=mx.random.key(2)) for key, value in norm.parameters().items()})
    if exact:
        add_exactly(norm)
    if frozen:
        norm.freeze()
    before = gradients(norm, 7, mx.float32)
    kind = type(norm).__name__
    improve_norms(norm)
    after = gradients(norm, 7, mx.float32)

    assert type(norm).__name__ == kind
    assert list(after) == list(before) == ["loss", "x", *norm.trainable_parameters()]
    for key, value in before.items():
        np.testing.assert_allclose(after[key], value, rtol=2e-6, atol=2e-6, err_msg=key)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_in_bfloat16_a_weight_learns_from_many_tokens(kind):
    ours = NORMS[kind]()
    ours.set_dtype(mx.bfloat16)
    improve_norms(ours)
    found = gradients(ours, 4096, mx.bfloat16)

    random = np.random.default_rng(1)
    x, weights = (torch.from_numpy(random.normal(size=(2, 4096, 40)) + 1).bfloat16().double() for _ in range(2))
    x.requires_grad_()
    exact = torch.nn.LayerNorm(40).double() if kind == "layer" else torch.nn.RMSNorm(40, eps=1e-5).double()
    (exact(x) * weights).sum().backward()

    wanted = {"x": x.grad} | {name: parameter.grad for name, parameter in exact.named_parameters()}
    assert len(wanted) == (3 if kind == "layer" else 2)
    for name, value in wanted.items():
        far = np.abs(np.array(found[name].astype(mx.float32)) - value.numpy()).max()
        assert far <= 2**-7 * value.abs().max().item(), name
