"""The LoRA layers alone: what they add, in which dtype, and what they leave alone."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.switch_layers import SwitchLinear

from hf_mlx.adapters.layers import DoRALinear, LoRAEmbedding, LoRALinear, dense_weight, layer_dims
from hf_mlx.adapters.parts import LoRAPart, LoRASwitchLinear, part_dims, split_rows
from hf_mlx.models.precision import CastLinear

IN, OUT, R = 64, 48, 4
# fp32 sums of 64 terms in another order.
CLOSE = 1e-5


def randomise(layer):
    mx.random.seed(1)
    for name in list(layer):
        if name.startswith("lora_") and isinstance(layer[name], mx.array):
            layer[name] = mx.random.normal(layer[name].shape)
    return layer


def sample(dtype=mx.float32):
    mx.random.seed(2)
    return mx.random.normal((2, 5, IN)).astype(dtype)


def test_a_new_layer_changes_nothing():
    base = nn.Linear(IN, OUT)
    assert mx.array_equal(LoRALinear(base, R, 2.0)(sample()), base(sample())).item()


def test_the_update_is_scale_b_a_x():
    base = nn.Linear(IN, OUT)
    layer = randomise(LoRALinear(base, R, 2.5, bias=True))
    expected = base(sample()) + 2.5 * (sample() @ layer.lora_A.T @ layer.lora_B.T + layer.lora_B_bias)
    assert mx.allclose(layer(sample()), expected, rtol=CLOSE, atol=CLOSE * 50).item()


@pytest.mark.parametrize(
    ("base_dtype", "compute", "input_dtype", "expected"),
    [
        (mx.float32, None, mx.float32, mx.float32),
        (mx.float32, mx.bfloat16, mx.float32, mx.bfloat16),
        (mx.bfloat16, mx.bfloat16, mx.bfloat16, mx.bfloat16),
        (mx.bfloat16, None, mx.bfloat16, mx.bfloat16),
    ],
)
def test_the_output_has_the_dtype_of_the_base_and_the_masters_stay_fp32(base_dtype, compute, input_dtype, expected):
    base = nn.Linear(IN, OUT)
    base.set_dtype(base_dtype)
    if compute is not None:
        base = CastLinear(base, compute)
    layer = randomise(LoRALinear(base, R, 0.5, compute_dtype=compute or mx.float32))
    assert layer(sample(input_dtype)).dtype == expected
    grads = nn.value_and_grad(layer, lambda x: layer(x).astype(mx.float32).sum())(sample(input_dtype))[1]
    assert {grads["lora_A"].dtype, grads["lora_B"].dtype} == {mx.float32}


def test_a_bf16_base_without_autocast_adds_the_update_in_fp32_before_it_rounds():
    base = nn.Linear(IN, OUT, bias=False)
    base.set_dtype(mx.bfloat16)
    layer = randomise(LoRALinear(base, R, 0.3))
    x = sample(mx.bfloat16)
    update = x.astype(mx.float32) @ layer.lora_A.T @ layer.lora_B.T * 0.3
    expected = (base(x).astype(mx.float32) + update).astype(mx.bfloat16)
    assert mx.array_equal(layer(x), expected).item()


def test_dropout_acts_while_training_only_and_leaves_the_base_path_whole():
    base = nn.Linear(IN, OUT)
    layer = randomise(LoRALinear(base, R, 1.0, dropout=0.5))
    layer.eval()
    still = layer(sample())
    assert mx.array_equal(still, layer(sample())).item()
    layer.train()
    mx.random.seed(0)
    assert not mx.allclose(layer(sample()), still).item()
    layer.lora_B = mx.zeros_like(layer.lora_B)
    assert mx.array_equal(layer(sample()), base(sample())).item()


def test_a_quantised_base_gets_the_same_update():
    dense = nn.Linear(IN, OUT)
    base = nn.QuantizedLinear.from_linear(dense, 32, 8)
    assert layer_dims(base) == (IN, OUT)
    layer = randomise(LoRALinear(base, R, 2.0))
    update = layer(sample()) - base(sample())
    expected = 2.0 * (sample() @ layer.lora_A.T @ layer.lora_B.T)
    assert mx.allclose(update, expected, rtol=1e-4, atol=1e-3).item()
    merged = layer.merged_weight()
    assert mx.allclose(merged, dense_weight(base) + layer.delta(), atol=1e-6).item()


def test_dora_starts_as_its_base_and_merges_into_one_weight():
    base = nn.Linear(IN, OUT)
    layer = DoRALinear(base, R, 2.0)
    layer.reset_magnitude()
    assert mx.allclose(layer(sample()), base(sample()), rtol=CLOSE, atol=CLOSE).item()
    layer = randomise(layer)
    merged = sample() @ layer.merged_weight().T + base.bias
    assert mx.allclose(layer(sample()), merged, rtol=1e-4, atol=1e-3).item()


def test_doras_norm_is_outside_the_gradient():
    layer = randomise(DoRALinear(nn.Linear(IN, OUT, bias=False), R, 1.0))
    layer.base_layer.freeze()
    norm = layer.weight_norm()

    def with_fixed_norm(b):
        full = layer.base_layer.weight + b @ layer.lora_A
        return (sample() @ ((layer.lora_magnitude_vector / norm)[:, None] * full).T).sum()

    expected = mx.grad(with_fixed_norm)(layer.lora_B)
    grads = nn.value_and_grad(layer, lambda x: layer(x).sum())(sample())[1]
    assert mx.allclose(grads["lora_B"], expected, rtol=1e-4, atol=1e-3).item()


def test_an_embedding_adds_its_tokens_column():
    base = nn.Embedding(100, IN)
    layer = randomise(LoRAEmbedding(base, R, 0.5))
    tokens = mx.array([[1, 99, 7]])
    table = base.weight + layer.delta()
    assert mx.allclose(layer(tokens), table[tokens], rtol=1e-4, atol=1e-4).item()
    assert mx.allclose(layer.merged_weight(), table).item()


def test_every_expert_has_its_own_update():
    stacks = [SwitchLinear(IN, OUT, 3, bias=False) for _ in range(2)]
    rows = split_rows(stacks)
    first = randomise(LoRASwitchLinear(stacks[0], R, 0.5, experts=3, dims=part_dims(stacks), rows=rows[0]))
    second = LoRAPart(stacks[1], first, rows[1])
    x = sample().reshape(10, 1, 1, IN)
    chosen = mx.array([[0], [1], [2], [0], [1], [2], [0], [1], [2], [0]])
    a, b = first.lora_A.reshape(3, R, IN), first.lora_B.reshape(2 * OUT, R, 3)
    for part, layer in enumerate((first, second)):
        out = np.array(layer(x, chosen)).reshape(10, OUT)
        merged = layer.merged_weight()
        for row in range(10):
            expert = chosen[row, 0].item()
            weight = stacks[part].weight[expert] + 0.5 * b[part * OUT : (part + 1) * OUT, :, expert] @ a[expert]
            assert np.allclose(out[row], np.array(x[row, 0, 0] @ weight.T), rtol=1e-4, atol=1e-3)
            assert mx.allclose(merged[expert], weight, rtol=1e-5, atol=1e-5).item()
    # One pair: the second part has no parameters of its own.
    assert [name for name, _ in second.named_modules() if name] == ["base_layer"]
    assert "lora_A" not in second
