"""Layers with a window, in rows so long that attention is told of it: as with a mask of all pairs of tokens."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from adapter_pairs import load_mlx, make_base
from mlx.utils import tree_flatten
from sampling import sampled

from hf_mlx.models.heads import layers
from hf_mlx.models.masks import packed_cache, row_cache
from hf_mlx.training.blocked_attention import CPU_LEAST, attend_in_blocks, written_windows

TYPES = (
    "afmoe", "cohere2", "cwm", "exaone4", "gemma3", "gemma3_text", "gemma4", "gemma4_text", "gpt_oss", "mimo_v2_flash",
    "ministral", "mistral", "mistral3", "mixtral", "olmo3", "phi3",
)  # fmt: skip
TOKENS = CPU_LEAST + 88


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", sampled(TYPES, "gemma3_text", "gpt_oss"))
def test_losses_and_gradients_are_those_of_a_written_mask(model_type, tmp_path):
    loaded = load_mlx(make_base(model_type, tmp_path))
    model = loaded.model
    attend_in_blocks(layers(model))
    written = written_windows(loaded)
    assert written == CPU_LEAST - 1
    assert row_cache(model, CPU_LEAST - 1, written) is None
    model.unfreeze()
    model.train()
    ids = mx.array(np.random.default_rng(0).integers(3, 64, (2, TOKENS)))
    documents = mx.array(np.repeat([[0, 1, 2], [0, 0, 1]], TOKENS // 3, axis=1))

    def gradients(cache):
        def loss(params):
            model.update(params)
            return (mx.logsumexp(model(ids, cache=cache).astype(mx.float32), axis=-1) ** 2).mean()

        params = model.trainable_parameters()
        value, by_params = mx.value_and_grad(loss)(params)
        model.update(params)
        return {"loss": value, **dict(tree_flatten(by_params))}

    compared = 0
    for said, masked in (
        (row_cache(model, TOKENS, written), None),
        (packed_cache(model, documents, written), packed_cache(model, documents)),
    ):
        found, expected = gradients(said), gradients(masked)
        largest = max(mx.abs(value).max().item() for value in expected.values())
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert mx.abs(found[name] - value).max().item() <= 1e-6 * largest, name
            compared += 1
    assert compared > 20
