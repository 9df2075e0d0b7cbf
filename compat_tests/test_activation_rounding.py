"""Activations in bf16: the bits of torch, in the models that call them."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import torch
from adapter_pairs import load_mlx, load_torch, make_base
from transformers.activations import ACT2FN

from hf_mlx.models.overrides.activations import ACTIVATIONS

NAMES = ("silu", "gelu", "gelu_pytorch_tanh")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_outputs_and_gradients_are_torchs_bits(name, dtype):
    x = 2 * np.random.default_rng(0).standard_normal((2, 20000)).astype(np.float32)
    gate, other = (torch.tensor(row).to(getattr(torch, dtype)).requires_grad_() for row in x)
    theirs = ACT2FN[name](gate) * other
    theirs.sum().backward()
    arrays = [mx.array(row).astype(getattr(mx, dtype)) for row in x]
    product = mx.compile(lambda gate, other: ACTIVATIONS[name](gate) * other)
    (ours,), gradients = mx.vjp(product, arrays, [mx.ones_like(arrays[0])])

    found = [ours, *gradients]
    expected = [theirs.detach(), gate.grad, other.grad]
    shares = [
        (np.array(a.astype(mx.float32)) == b.float().numpy()).mean() for a, b in zip(found, expected, strict=True)
    ]
    assert len(shares) == 3
    # Each rounded after each operation, half of the gate's gradient is another number.
    assert min(shares) > 0.97


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gemma4_text", "starcoder2", "phi3", "olmo2"])
def test_a_feed_forward_network_in_bf16_is_transformers(model_type, tmp_path):
    base = make_base(model_type, tmp_path, hidden_size=64, intermediate_size=256)
    ours = load_mlx(base).model.layers[0].mlp
    theirs = load_torch(base).model.layers[0].mlp.to(torch.bfloat16)
    ours.set_dtype(mx.bfloat16)
    x = np.random.default_rng(1).standard_normal((1, 200, 64)).astype(np.float32)

    with torch.no_grad():
        expected = theirs(torch.tensor(x).to(torch.bfloat16)).float().numpy()
    found = np.array(ours(mx.array(x).astype(mx.bfloat16)).astype(mx.float32))

    assert found.shape == expected.shape == (1, 200, 64)
    assert (found == expected).mean() > 0.9
