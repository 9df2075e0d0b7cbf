"""The head apart from the backbone, the embedding, the blocks, and packed rows."""

from __future__ import annotations

import mlx.core as mx
import pytest
from tiny_checkpoints import LLAMA, llama_tensors, write_llama

from hf_mlx.models.architectures import can_pack
from hf_mlx.models.heads import Head, embed, embedding_path, layers, split_head
from hf_mlx.models.load import load_model
from hf_mlx.models.masks import packed_cache
from hf_mlx.settings.plan import ModelPlan

IDS = mx.array([[5, 9, 2, 40, 33, 7, 21, 3], [8, 8, 1, 60, 2, 19, 30, 4]])
# fp32, two layers, another order of summation.
CLOSE = 1e-5


@pytest.mark.parametrize("tied", [False, True])
def test_the_two_parts_give_the_models_logits_bit_for_bit(tied, tmp_path):
    config = {**LLAMA, "tie_word_embeddings": tied}
    loaded = load_model(write_llama(tmp_path, llama_tensors(config), tie_word_embeddings=tied), ModelPlan())

    backbone, head = split_head(loaded)
    hidden = backbone(loaded.model, IDS)

    assert hidden.shape == (2, 8, LLAMA["hidden_size"])
    assert head.tied is tied
    assert mx.array_equal(head(loaded.model, hidden), loaded.model(IDS))


def test_the_backbone_takes_embeddings_in_place_of_ids(tmp_path):
    loaded = load_model(write_llama(tmp_path), ModelPlan())
    backbone, _ = split_head(loaded)

    hidden = backbone(loaded.model, IDS, input_embeddings=embed(loaded.model, IDS))

    assert embedding_path(loaded.model) == "model.embed_tokens"
    assert mx.array_equal(hidden, backbone(loaded.model, IDS))
    assert len(layers(loaded.model)) == LLAMA["num_hidden_layers"]


def test_scale_and_softcap_finish_the_logits_in_order():
    raw = mx.array([[1.0, -2.0]])
    head = Head("lm_head", tied=False, multiplier=2.0, divisor=4.0, softcap=3.0)

    assert mx.allclose(head.finish(raw), mx.tanh(raw * 0.5 / 3.0) * 3.0)


@pytest.mark.parametrize("window", [None, 3])
def test_packed_examples_equal_separate_ones(window, tmp_path):
    mistral = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": window}
    model = load_model(write_llama(tmp_path, **mistral), ModelPlan()).model
    segments = mx.array([[0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 2, 2]])

    step = mx.compile(lambda ids, segments: model(ids, cache=packed_cache(model, segments)))
    packed = step(IDS, segments)

    pieces = [(0, 0, 3), (0, 3, 8), (1, 0, 6), (1, 6, 8)]
    for row, start, stop in pieces:
        alone = model(IDS[row : row + 1, start:stop])
        assert mx.abs(packed[row, start:stop] - alone[0]).max() < CLOSE
    assert len(pieces) == 4


def test_a_compiled_step_follows_the_segments_it_is_given(tmp_path):
    model = load_model(write_llama(tmp_path), ModelPlan()).model
    step = mx.compile(lambda ids, segments: model(ids, cache=packed_cache(model, segments)))
    one, two = mx.zeros((2, 8), mx.int32), mx.array([[0, 0, 0, 0, 1, 1, 1, 1]] * 2)

    assert mx.abs(step(IDS, one) - model(IDS)).max() < CLOSE
    assert mx.abs(step(IDS, two) - step(IDS, one)).max() > 1e-2


def test_the_mask_is_causal_within_segments_and_windows():
    cache = packed_cache(_Layers(), mx.array([[0, 0, 0, 1]]))[0]

    full = cache.make_mask(4)
    windowed = cache.make_mask(4, return_array=True, window_size=2)

    assert full.shape == (1, 1, 4, 4)
    assert full.dtype == mx.bool_
    assert full[0, 0].tolist() == [
        [True, False, False, False],
        [True, True, False, False],
        [True, True, True, False],
        [False, False, False, True],
    ]
    assert windowed[0, 0, 2].tolist() == [False, True, True, False]


@pytest.mark.parametrize(("model_type", "packs"), [("llama", True), ("gpt2", False), ("mamba", False), ("quux", False)])
def test_only_types_that_keep_rows_apart_may_be_packed(model_type, packs):
    assert can_pack(model_type) is packs


class _Layers:
    layers = (None,)
