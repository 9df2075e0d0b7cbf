"""The routers' loss: what it is for loads known by hand, and that a recomputed block hands it the same gradient."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from hf_mlx.settings.plan import CheckpointingPlan
from hf_mlx.surface.memory import MemoryMeter
from hf_mlx.training.cast_weights import cast_weights
from hf_mlx.training.checkpointing import checkpoint_layers
from hf_mlx.training.router import RouterLog, Routers

# fp32 arithmetic on numbers of order one.
CLOSE = 1e-6
EXPERTS = 4


def balance(logits, counted, top_k=1):
    return Routers(RouterLog(), top_k, 1.0).balance(logits, counted).item()


def one_hot(experts):
    return 100.0 * (mx.array(experts)[:, None] == mx.arange(EXPERTS)).astype(mx.float32)


@pytest.mark.parametrize(
    ("experts", "expected"),
    [([0, 1, 2, 3], 1.0), ([0, 0, 0, 0], 4.0), ([0, 0, 1, 1], 2.0)],
    ids=["even", "one expert", "two experts"],
)
def test_the_loss_of_a_load_known_by_hand(experts, expected):
    assert balance([one_hot(experts)], mx.ones((1, 4), mx.bool_)) == pytest.approx(expected, rel=CLOSE)


def test_padding_does_not_count():
    counted = mx.array([[True, True, True, True], [False] * 4])
    with_padding = one_hot([0, 1, 2, 3, 0, 0, 0, 0]).reshape(2, 4, EXPERTS)
    assert balance([with_padding], counted) == pytest.approx(1.0, rel=CLOSE)


def test_load_is_shared_over_the_layers():
    # Each layer sends everything to one expert, and the two to different ones.
    layers = [one_hot([0, 0, 0, 0]), one_hot([1, 1, 1, 1])]
    assert balance(layers, mx.ones((1, 4), mx.bool_)) == pytest.approx(2.0, rel=CLOSE)


def test_nothing_is_kept_outside_of_a_recording():
    log = RouterLog()
    log.add(mx.zeros(1))
    with log.recording() as outer:
        log.add(mx.zeros(2))
        with log.recording() as inner:
            log.add(mx.zeros(3))
        log.add(*inner)
    log.add(mx.zeros(4))
    assert [logits.shape for logits in outer] == [(2,), (3,)]


class Block(nn.Module):
    def __init__(self, log):
        super().__init__()
        self.gate = nn.Linear(8, EXPERTS)
        self.mix = nn.Linear(8, 8)
        self.log = log

    def __call__(self, x):
        self.log.add(self.gate(x))
        return x + mx.tanh(self.mix(x))


class Model(nn.Module):
    def __init__(self, log):
        super().__init__()
        self.layers = [Block(log), Block(log)]

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("every", [1, 2])
def test_a_recomputed_block_gives_the_same_gradient(every, compiled):
    found = []
    for enabled in (False, True):
        mx.random.seed(3)
        log = RouterLog()
        model, routers = Model(log), Routers(log, 2, 1.0)
        checkpoint_layers(model, CheckpointingPlan(enabled=enabled, every_n_layers=every), log)
        x = mx.random.normal((2, 5, 8), key=mx.random.key(1))

        def loss(params, model=model, routers=routers, x=x):
            model.update(params)
            with routers.log.recording() as logits:
                output = model(x)
            assert len(logits) == 2
            return mx.square(output).mean() + routers.balance(logits, mx.ones((2, 5), mx.bool_))

        gradient = mx.grad(loss)
        gradient = mx.compile(gradient) if compiled else gradient
        found.append(dict(tree_flatten(gradient(model.trainable_parameters()))))
    plain, recomputed = found
    assert len(plain) == 8
    for name, value in plain.items():
        assert mx.abs(value).max() > 0, name
        assert mx.allclose(value, recomputed[name], atol=CLOSE), name


def test_weights_come_back_as_they_were():
    model = Model(RouterLog())
    before = dict(tree_flatten(model.parameters()))
    with pytest.raises(KeyError), cast_weights(model, mx.bfloat16):
        assert {value.dtype for _, value in tree_flatten(model.parameters())} == {mx.bfloat16}
        raise KeyError
    after = dict(tree_flatten(model.parameters()))
    assert len(after) == 8
    assert all(mx.array_equal(after[name], value) and after[name].dtype == mx.float32 for name, value in before.items())


def test_memory_of_a_stage_and_of_what_came_before_it():
    meter, metrics, inner = MemoryMeter(enabled=True), {}, {}
    meter.start("init")
    held = mx.zeros((256, 1024))
    mx.eval(held)
    meter.stop("init")
    meter.start("train")
    mx.eval(mx.zeros((512, 1024)) + 1)
    meter.start("eval")  # within training
    meter.stop("eval", inner)
    meter.stop("train", metrics)
    assert inner == {}
    assert metrics["init_mem_gpu_alloc_delta"] >= held.nbytes
    assert metrics["train_mem_gpu_peaked_delta"] >= 2 * held.nbytes
    assert set(metrics) >= {"before_init_mem_gpu", "train_mem_gpu_alloc_delta"}
    off: dict[str, float] = {}
    MemoryMeter(enabled=False).stop("train", off)
    assert off == {}
