"""Feed-forward networks that recompute, and ordered backward passes: less memory, the same gradients."""

import re
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.activations import swiglu
from peaks import peak_of

from hf_mlx.adapters.layers import LoRALinear
from hf_mlx.training.backward_order import order_backward
from hf_mlx.training.feed_forward import recompute_activations
from hf_mlx.training.recompute import recompute
from hf_mlx.training.weight_gradients import lay_out_gradients

WIDTH, WIDE = 16, 64
# fp32: the same operations, which the compiler may fuse otherwise.
RELATIVE = 1e-5


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(WIDTH, WIDE, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(WIDE, WIDTH)

    def __call__(self, x):
        return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.act = nn.Linear(WIDTH, WIDE), nn.Linear(WIDE, WIDTH), nn.GELU()

    def __call__(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Fused(nn.Module):
    """One product for gate and value, as in Phi-3."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Linear(WIDTH, 2 * WIDE), nn.Linear(WIDE, WIDTH)

    def __call__(self, x):
        gate, x = mx.split(self.gate_up_proj(x), 2, axis=-1)
        return self.down_proj(nn.silu(gate) * x)


class Swiglu(Gated):
    """mlx-lm's own function between the products, as in most of its models."""

    def __call__(self, x):
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class AddsItsInput(Gated):
    """Reads its input between its products."""

    def __call__(self, x):
        return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x) + mx.tile(x, WIDE // WIDTH))


class ReadsItsInputAgain(Gated):
    def __call__(self, x):
        return super().__call__(x) * mx.sigmoid(x) + x


class AsksTwice(Gated):
    def __call__(self, x):
        return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x) * self.up_proj(2 * x))


class Deep(Gated):
    def __init__(self):
        super().__init__()
        self.middle = nn.Linear(WIDE, WIDE)

    def __call__(self, x):
        return self.down_proj(nn.silu(self.middle(nn.silu(self.gate_proj(x)) * self.up_proj(x))))


class Block(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.norm, self.mlp = nn.RMSNorm(WIDTH), network

    def __call__(self, x):
        return x + self.mlp(self.norm(x))


def make_blocks(network, count):
    mx.random.seed(0)
    blocks = nn.Module()
    blocks.layers = [Block(network()) for _ in range(count)]
    return blocks


def gradients(blocks, x, *, compiled):
    def loss(params, x):
        blocks.update(params)
        for layer in blocks.layers:
            x = layer(x)
        return mx.square(x).mean()

    function = mx.value_and_grad(loss, argnums=(0, 1))
    params = blocks.trainable_parameters()
    value, (by_params, by_x) = (mx.compile(function) if compiled else function)(params, x)
    blocks.update(params)
    return {"value": value, "x": by_x, **dict(tree_flatten(by_params))}


FIRST, LAST = ("gate_proj", "fc1", "gate_up_proj"), ("down_proj", "fc2")


@pytest.mark.parametrize("on_cpu", [True, False], ids=["as on a CPU", "as on a GPU"])
@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "eager"])
@pytest.mark.parametrize("frozen", [(), FIRST, LAST], ids=["all", "first", "last"])
@pytest.mark.parametrize(
    "network", [Gated, Swiglu, TwoLayers, Fused, AddsItsInput, ReadsItsInputAgain, AsksTwice, Deep]
)
def test_the_gradients_are_those_of_the_plain_network(network, frozen, compiled, on_cpu, monkeypatch):
    monkeypatch.setattr("hf_mlx.training.feed_forward.on_cpu", lambda: on_cpu)
    plain, changed = (make_blocks(network, 3) for _ in range(2))
    for blocks in (plain, changed):
        for layer in blocks.layers:
            for name in frozen:
                layer.mlp.get(name, nn.Module()).freeze()
    recompute_activations(changed.layers)
    order_backward(changed.layers)
    x = mx.random.normal((2, 8, WIDTH))
    expected, found = (gradients(blocks, x, compiled=compiled) for blocks in (plain, changed))

    assert found.keys() == expected.keys() and len(found) > 8
    for name, value in expected.items():
        assert mx.allclose(found[name], value, rtol=RELATIVE, atol=RELATIVE * mx.abs(value).max().item()), name
    assert isinstance(changed.layers[0].mlp, network)


def test_a_call_leaves_the_parameters_as_they_were():
    blocks = make_blocks(Gated, 1)
    recompute_activations(blocks.layers)
    order_backward(blocks.layers)
    before = dict(tree_flatten(blocks.parameters()))
    mx.eval(blocks.layers[0](mx.ones((1, 2, WIDTH))))
    after = dict(tree_flatten(blocks.parameters()))

    assert all(after[name] is before[name] for name in before) and len(before) == 5


def test_a_backward_pass_holds_less():
    x = mx.random.normal((64, 64, WIDTH))
    peaks = []
    for change in (False, True):
        blocks = make_blocks(Gated, 8)
        if change:
            recompute_activations(blocks.layers)
            order_backward(blocks.layers)
        peaks.append(peak_of(lambda blocks=blocks: gradients(blocks, x, compiled=True)))

    assert peaks[1] < 0.75 * peaks[0]


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "eager"])
def test_what_is_recomputed_gives_the_same_and_forgets(compiled):
    def block(params, x, mask, scale=None, *, kind="sin", parts=()):
        wide = getattr(mx, kind)(x @ params["wide"])
        return (mx.cos(wide) @ params["back"]) * parts[0] + x, [mx.where(mask, wide, 0).sum() * (scale or 1)]

    mx.random.seed(0)
    params = {"wide": mx.random.normal((WIDTH, WIDE)), "back": mx.random.normal((WIDE, WIDTH)) / WIDE}
    x, part = mx.random.normal((2048, WIDTH)), mx.array([0.5])
    found, peaks = [], []
    for change in (lambda function: function, mx.checkpoint, recompute):

        def loss(params, x, part, change=change):
            total = 0
            for _ in range(8):
                x, (noted,) = change(block)(params, x, mx.arange(WIDE) > 9, None, kind="sin", parts=(part,))
                total = total + noted
            return mx.square(x).mean() + 1e-3 * total

        function = mx.value_and_grad(loss, argnums=(0, 1, 2))
        function = mx.compile(function) if compiled else function
        peaks.append(peak_of(partial(function, params, x, part)))
        value, (by_params, by_x, by_part) = function(params, x, part)
        found.append([value, by_params["wide"], by_params["back"], by_x, by_part])

    for expected in found[:2]:
        for theirs, ours in zip(expected, found[2], strict=True):
            assert mx.allclose(ours, theirs, rtol=RELATIVE, atol=RELATIVE * mx.abs(theirs).max().item())
    assert len(found) == 3 and peaks[2] < 0.95 * peaks[0]


def test_the_gradient_of_an_adapted_layer_s_input_waits_for_the_adapter_s(tmp_path):
    block = nn.Module()
    block.layer = LoRALinear(nn.Linear(WIDTH, WIDE, bias=False), 4, 2.0, compute_dtype=mx.bfloat16)
    block.layer.base_layer.freeze()
    block.layer.base_layer.weight = block.layer.base_layer.weight.astype(mx.bfloat16)
    x = mx.ones((3, WIDTH), mx.bfloat16)
    mx.eval(block.parameters(), x)
    order_backward([block])

    def loss(x, a, b):
        block.layer.update({"lora_A": a, "lora_B": b})
        return block.layer(x).astype(mx.float32).sum()

    by_x, by_a, by_b = mx.grad(loss, argnums=(0, 1, 2))(x, block.layer.lora_A, block.layer.lora_B)
    # What only one of the arrays needs would not have been computed with the other.
    mx.export_to_dot(str(tmp_path / "alone.dot"), by_x)
    mx.export_to_dot(str(tmp_path / "all.dot"), by_x, by_a, by_b)
    graphs = [(tmp_path / name).read_text(encoding="utf-8") for name in ("alone.dot", "all.dot")]
    alone, everything = (graph.count("Matmul") + graph.count("AddMM") for graph in graphs)
    assert alone == everything == 6


def test_nothing_is_recomputed_before_its_gradient_is_there(tmp_path):
    x, by_output = mx.ones(3), mx.ones(3) / 2
    mx.eval(x, by_output)
    _, (by_x,) = mx.vjp(recompute(lambda x: mx.cos(mx.sin(x))), [x], [mx.erfinv(by_output)])
    mx.export_to_dot(str(tmp_path / "graph.dot"), by_x)
    lines = (tmp_path / "graph.dot").read_text(encoding="utf-8").splitlines()
    names = dict(re.findall(r'(\d+) \[label ="(\w+)"', "\n".join(lines)))
    edges = [line.replace('"', "").split(" -> ") for line in lines if " -> " in line]
    reached = {node for node, name in names.items() if name == "ErfInv"}
    for _ in edges:
        reached |= {end for start, end in edges if start in reached}

    computed = [node for node, name in names.items() if name in ("Sin", "Cos")]
    assert len(computed) == 3 and reached.issuperset(computed)


@pytest.mark.parametrize("network", [Gated, TwoLayers, Fused, Swiglu])
def test_of_each_trained_weight_three_products_are_computed(network, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_mlx.training.feed_forward.on_cpu", lambda: False)
    blocks = make_blocks(network, 2)
    lay_out_gradients(blocks)
    recompute_activations(blocks.layers)
    order_backward(blocks.layers)
    x = mx.ones((3, 5, WIDTH))
    mx.eval(blocks.parameters(), x)

    made = gradients(blocks, x, compiled=True)
    mx.export_to_dot(str(tmp_path / "graph.dot"), *made.values())
    graph = (tmp_path / "graph.dot").read_text(encoding="utf-8")
    weights = [name for name in made if name.endswith("weight") and "norm" not in name]
    assert len(weights) == 2 * (2 if network in (TwoLayers, Fused) else 3)
    assert graph.count("Matmul") + graph.count("AddMM") == 3 * len(weights)
