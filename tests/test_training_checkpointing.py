"""Blocks with checkpointing that keep their activations, where gradients that come later take more."""

from functools import partial
from types import SimpleNamespace

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.llama import Model, ModelArgs
from peaks import peak_of

from hf_mlx.settings.plan import CheckpointingPlan
from hf_mlx.training.backward_order import order_backward
from hf_mlx.training.block_memory import BlockMemory, whole_blocks
from hf_mlx.training.blocked_attention import attend_in_blocks
from hf_mlx.training.checkpointing import checkpoint_layers
from hf_mlx.training.feed_forward import recompute_activations
from hf_mlx.training.weight_gradients import lay_out_gradients

BLOCKS, HIDDEN, VOCABULARY = 4, 128, 256
PLAN = SimpleNamespace(use_cpu=True, model=SimpleNamespace(precision=SimpleNamespace(autocast=None)))


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    """Attention that keeps no scores, as in rows of any length on CUDA and in long ones elsewhere."""
    monkeypatch.setattr(BlockMemory, "writes_scores", lambda self, block: False)


def make(tokens, *, blocks=BLOCKS, whole=True, enabled=True):
    """A model that trains whole, with a batch and a function of it."""
    mx.random.seed(0)
    model = Model(
        ModelArgs(
            model_type="llama", hidden_size=HIDDEN, num_hidden_layers=blocks, intermediate_size=512,
            num_attention_heads=2, rms_norm_eps=1e-5, vocab_size=VOCABULARY, tie_word_embeddings=False,
        )
    )  # fmt: skip
    model.train()
    lay_out_gradients(model)
    memory = BlockMemory.of(model, PLAN)
    checkpoint_layers(model, CheckpointingPlan(enabled=enabled), memory=memory if whole else None)
    attend_in_blocks(model.layers)
    recompute_activations(model.layers)
    order_backward(model.layers)
    ids = mx.random.randint(0, VOCABULARY, (1, tokens))

    def loss(params):
        model.update(params)
        return mx.square(model(ids)).mean()

    return model, memory, mx.compile(mx.value_and_grad(loss))


def products(found, folder):
    file = folder / "graph.dot"
    mx.export_to_dot(str(file), *(value for _, value in tree_flatten(found)))
    return file.read_text(encoding="utf-8").count('label ="Matmul"')


@pytest.mark.parametrize("tokens, fewest, most", [(8, BLOCKS, BLOCKS), (192, 1, BLOCKS - 1), (512, 1, 1), (1024, 0, 0)])
def test_large_batches_compute_more_blocks_again_and_no_number_changes(tokens, fewest, most, tmp_path):
    counts, results = {}, {}
    for case in ({"enabled": False}, {"whole": False}, {}):
        model, _, function = make(tokens, **case)
        found = function(model.trainable_parameters())
        counts[str(case)] = products(found, tmp_path)
        results[str(case)] = dict(tree_flatten(list(found)))
    none, all_again, some_again = counts.values()
    each = (all_again - none) // BLOCKS
    assert all_again == none + BLOCKS * each > none

    left = (some_again - none) // each
    assert fewest <= BLOCKS - left <= most
    plain, *others = results.values()
    assert len(plain) == 1 + len(tree_flatten(model.parameters()))
    for other in others:
        for name, value in plain.items():
            assert mx.abs(other[name] - value).max() <= 1e-6 * mx.abs(value).max(), name


@pytest.mark.parametrize("tokens", [16, 64, 192])
def test_the_peak_does_not_rise(tokens):
    def peak(whole):
        # Of so many that an array of weights, freed sooner or later, is a fiftieth of the peak.
        model, _, function = make(tokens, blocks=12, whole=whole)
        return peak_of(partial(function, model.trainable_parameters()))

    assert peak(True) <= 1.06 * peak(False)


def test_adapters_alone_recompute_every_block():
    model, memory, _ = make(8)
    model.freeze()
    for block in model.layers:
        block.mlp.down_proj.unfreeze()
    assert whole_blocks(model, model.layers, memory, 1) == 0
