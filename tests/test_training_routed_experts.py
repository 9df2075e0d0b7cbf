"""Experts on sorted tokens: the gradients of mlx-lm's own modules, whatever is trained in them."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchGLU, SwitchLinear, SwitchMLP

from hf_mlx.adapters.parts import LoRAPart, LoRASwitchLinear, Rows
from hf_mlx.models.precision import cast_for_experts
from hf_mlx.training import routed_experts, weight_gradients
from hf_mlx.training.routed_experts import route_experts, tile_size

EXPERTS, CHOICES = 6, 3


def _adapted(mixture: nn.Module) -> nn.Module:
    mixture.freeze()
    name = "up_proj" if isinstance(mixture, SwitchGLU) else "fc1"
    layer = LoRASwitchLinear(
        mixture[name], r=2, scale=0.7, experts=EXPERTS, dims=(32, 64), rows=lambda b: b, compute_dtype=mx.float32
    )
    layer.lora_A, layer.lora_B = mx.random.normal(layer.lora_A.shape), mx.random.normal(layer.lora_B.shape)
    mixture[name] = layer
    return mixture


def _quantised(mixture: nn.Module) -> nn.Module:
    nn.quantize(mixture, group_size=32, bits=4)
    return mixture


def _frozen(mixture: nn.Module) -> nn.Module:
    mixture.freeze()
    return mixture


def _shared(mixture: Any) -> nn.Module:
    """One pair for gate and up projection, as PEFT holds them, and one for the last product."""
    mixture.freeze()
    if isinstance(mixture, SwitchMLP):
        return _adapted(mixture)
    options: Any = {"scale": 0.7, "experts": EXPERTS, "compute_dtype": mx.float32}
    owner = LoRASwitchLinear(mixture.gate_proj, r=4, dims=(32, 128), rows=Rows(lambda b: b[:64]), **options)
    down = LoRASwitchLinear(mixture.down_proj, r=2, dims=(64, 32), rows=Rows(), **options)
    for layer in (owner, down):
        # Small, or the loss saturates and magnifies what a sum's order changes.
        for name in ("lora_A", "lora_B"):
            layer[name] = mx.random.normal(layer[name].shape) / 8
    mixture.gate_proj, mixture.down_proj = owner, down
    mixture.up_proj = LoRAPart(mixture.up_proj, owner, Rows(lambda b: b[64:]))
    return mixture


def _cast(layer: SwitchLinear) -> nn.Module:
    cast_for_experts(layer)
    return layer


def _packed(layer: SwitchLinear) -> nn.Module:
    return layer.to_quantized(32, 4)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [SwitchGLU, SwitchMLP])
@pytest.mark.parametrize("change", [_frozen, _quantised, _adapted, _shared, lambda mixture: mixture])
def test_gradients_are_those_of_mlx_lm(kind, change, bias):
    assert_same_gradients(change(kind(32, 64, EXPERTS, bias=bias)))


@pytest.mark.parametrize("kind", [SwitchGLU, SwitchMLP])
@pytest.mark.parametrize("change", [_adapted, _shared])
def test_adapters_on_tokens_have_the_gradients_of_adapters_on_rows(kind, change, monkeypatch):
    # What a CUDA device does, whose gathered products waste most of a narrow one.
    monkeypatch.setattr(routed_experts, "on_cuda", lambda: True)
    assert_same_gradients(change(kind(32, 64, EXPERTS)))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [SwitchGLU, SwitchMLP])
@pytest.mark.parametrize("change", [_frozen, _adapted, _shared, lambda mixture: mixture])
@pytest.mark.parametrize("size", [4, 64])
def test_experts_in_tiles_have_the_gradients_of_experts_on_rows(kind, change, bias, size, monkeypatch):
    # An expert without rows, and tiles of several, some half full; then one tile for each.
    monkeypatch.setattr(routed_experts, "tile_size", lambda layers, choices: (size, EXPERTS))
    assert_same_gradients(change(kind(32, 64, EXPERTS, bias=bias)))


def test_tiles_are_for_many_rows_of_frozen_experts_in_half_precision_on_cuda(monkeypatch):
    def chosen(mixture, choices):
        return tile_size(list(mixture.children().values())[:2], choices)[0]

    half, single = _frozen(SwitchGLU(32, 64, EXPERTS)), _frozen(SwitchGLU(32, 64, EXPERTS))
    half.set_dtype(mx.bfloat16)
    assert chosen(half, 4096) == 1
    monkeypatch.setattr(routed_experts, "on_cuda", lambda: True)
    assert [chosen(half, count) for count in (100, 2303, 2304, 4096)] == [1, 1, 192, 384]
    trained = SwitchGLU(32, 64, EXPERTS)
    trained.set_dtype(mx.bfloat16)
    assert [chosen(other, 4096) for other in (single, trained, _quantised(_frozen(SwitchGLU(32, 64, EXPERTS))))] == [
        1
    ] * 3


@pytest.mark.parametrize("change", [_cast, _packed])
@pytest.mark.parametrize("sort", [True, False], ids=["sorted", "as they come"])
def test_an_expert_s_bias_learns_from_each_of_its_rows_on_a_gpu(change, sort, monkeypatch):
    """In bfloat16 256 + 1 is 256."""
    monkeypatch.setattr(weight_gradients, "on_cpu", lambda: False)
    model = nn.Module()
    layer = SwitchLinear(32, 40, EXPERTS)
    layer.set_dtype(mx.bfloat16)
    model.layer = change(layer)
    model.layer.freeze()
    model.layer.unfreeze(keys="bias", recurse=False)
    model.train()
    random = np.random.default_rng(0)
    chosen = np.where(random.random(4000) < 0.8, 4, random.integers(0, EXPERTS - 1, 4000))
    chosen = np.sort(chosen) if sort else chosen
    x, by_out = (mx.array(random.normal(size=(4000, 1, width)) + 1).astype(mx.bfloat16) for width in (32, 40))
    bias = mx.random.normal((EXPERTS, 40)).astype(mx.bfloat16)

    def derive():
        def out(bias, x):
            model.layer.bias = bias
            return model.layer(x, mx.array(chosen), sorted_indices=sort)

        (value,), (by_bias, by_x) = mx.compile(lambda bias, x: mx.vjp(out, [bias, x], [by_out]))(bias, x)
        model.layer.bias = bias
        return value, by_x, by_bias

    *expected, stood_still = derive()
    route_experts([model])
    *found, by_bias = derive()

    assert all(mx.array_equal(*pair) for pair in zip(found, expected, strict=True)) and len(found) == 2
    exact = np.zeros((EXPERTS, 40))
    np.add.at(exact, chosen, np.array(by_out[:, 0].astype(mx.float32), np.float64))
    errors = [np.abs(np.array(array.astype(mx.float32)) - exact).max() for array in (by_bias, stood_still)]
    assert by_bias.dtype == mx.bfloat16 and errors[0] <= 2**-8 * np.abs(exact).max() < errors[1] / 100
    assert np.bincount(chosen, minlength=EXPERTS)[-1] == 0 < np.bincount(chosen, minlength=EXPERTS)[0]


def assert_same_gradients(mixture: nn.Module) -> None:
    mx.random.seed(3)
    x, weights = mx.random.normal((2, 40, 32)), mx.random.normal((2, 40, CHOICES))
    # One expert gets nothing, and another most.
    chosen = mx.minimum(mx.random.randint(0, 9, (2, 40, CHOICES)), EXPERTS - 2)

    def loss(x, weights, params):
        mixture.update(params)
        return (mx.tanh((mixture(x, chosen) * weights[..., None]).sum(axis=-2)) ** 2).sum()

    def measure():
        params = mixture.trainable_parameters()
        value, grads = mx.value_and_grad(loss, argnums=(0, 1, 2))(x, weights, params)
        mixture.update(params)
        return value, [array for _, array in tree_flatten(grads)]

    value, expected = measure()
    route_experts([mixture])
    mixture.train()
    again, found = measure()
    assert again.item() == pytest.approx(value.item(), rel=1e-6)
    assert len(found) == len(expected) >= 2
    for old, new in zip(expected, found, strict=True):
        assert mx.abs(new - old).max().item() <= 2e-6 * mx.abs(old).max().item()


def test_evaluation_is_mlx_lms():
    mixture = SwitchGLU(32, 64, EXPERTS)
    x, chosen = mx.random.normal((1, 40, 32)), mx.random.randint(0, EXPERTS, (1, 40, CHOICES))
    expected = mixture(x, chosen)
    route_experts([mixture])
    mixture.eval()
    assert mx.array_equal(mixture(x, chosen), expected)
