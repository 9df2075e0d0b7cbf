"""Checkpointed blocks that keep their attention: the same gradients, and attention is not computed once more."""

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import gemma2, gpt_oss, llama, qwen3_moe

from hf_mlx.settings.plan import CheckpointingPlan
from hf_mlx.training.backward_order import order_backward
from hf_mlx.training.blocked_attention import attend_in_blocks
from hf_mlx.training.checkpointing import checkpoint_layers
from hf_mlx.training.feed_forward import recompute_activations
from hf_mlx.training.routed_experts import route_experts

# fp32: the same operations, fused otherwise by the compiler.
RELATIVE = 1e-5
LAYERS, LENGTH = 4, 24
SIZES = {
    "hidden_size": 32, "num_hidden_layers": LAYERS, "intermediate_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5, "vocab_size": 64, "rope_theta": 10000.0,
}  # fmt: skip
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2), "sliding_window": 5}
MIXTURE = {
    "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
    "moe_intermediate_size": 16, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
KINDS = {
    "llama": (llama, {}),
    "llama with windows": (llama, WINDOWS),
    # Sinks are trained, and a window's mask is an array.
    "gpt_oss": (gpt_oss, {"num_local_experts": 4, "num_experts_per_tok": 2, **WINDOWS}),
    "qwen3_moe": (qwen3_moe, MIXTURE),
    # With a softcap, attention is code of its own.
    "gemma2": (gemma2, {}),
}


def make(kind):
    module, more = KINDS[kind]
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict({"model_type": kind.split()[0], **SIZES, **more}))
    model.train()
    mx.eval(model.parameters())
    return model


def train(model, ids, *, compiled):
    def loss(params):
        model.update(params)
        return mx.square(model(ids)).mean()

    params = model.trainable_parameters()
    function = mx.value_and_grad(loss)
    try:
        value, found = (mx.compile(function) if compiled else function)(params)
        return {"loss": value, **dict(tree_flatten(found))}
    finally:
        model.update(params)


def prepare(model):
    checkpoint_layers(model, CheckpointingPlan(enabled=True))
    route_experts(model.layers)
    attend_in_blocks(model.layers)
    recompute_activations(model.layers)
    order_backward(model.layers)
    return model


def attentions(found, folder):
    file = folder / "graph.dot"
    mx.export_to_dot(str(file), *found.values())
    return file.read_text(encoding="utf-8").count('label ="Max"')


@pytest.fixture
def as_on_cuda(monkeypatch):
    monkeypatch.setattr("hf_mlx.training.kept_attention.is_fused", lambda *_: True)
    monkeypatch.setattr("hf_mlx.training.kept_attention.LEAST", LENGTH)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradients_are_those_of_the_plain_model(kind, as_on_cuda):
    ids = mx.random.randint(0, 64, (2, LENGTH), key=mx.random.key(0))
    expected = train(make(kind), ids, compiled=False)
    for compiled in (True, False):
        found = train(prepare(make(kind)), ids, compiled=compiled)
        assert sorted(found) == sorted(expected) and len(found) > 8 * LAYERS
        for name, value in expected.items():
            assert mx.abs(found[name] - value).max().item() <= RELATIVE * max(mx.abs(value).max().item(), 1e-3), name


@pytest.mark.parametrize("shorter", [0, 1])
def test_a_quarter_of_the_blocks_attend_once_in_long_rows(shorter, as_on_cuda, tmp_path):
    ids = mx.random.randint(0, 64, (2, LENGTH - shorter))
    model = prepare(make("llama"))
    found = train(model, ids, compiled=False)
    # Attention on this device is products around exponentials, which its backward pass reads; a pass has one Max.
    assert attentions(found, tmp_path) == 2 * LAYERS - (0 if shorter else LAYERS // 4)


def test_without_a_kernel_of_attention_all_is_recomputed(monkeypatch, tmp_path):
    monkeypatch.setattr("hf_mlx.training.kept_attention.LEAST", LENGTH)
    found = train(prepare(make("llama")), mx.random.randint(0, 64, (2, LENGTH)), compiled=False)
    assert attentions(found, tmp_path) == 2 * LAYERS
