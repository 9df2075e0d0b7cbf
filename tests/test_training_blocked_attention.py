"""Attention a block of queries at a time: the same outputs and gradients, and memory that grows as the length."""

from __future__ import annotations

from functools import partial

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import gemma3_text, gpt_oss, llama
from mlx_lm.models.base import create_causal_mask, scaled_dot_product_attention
from peaks import peak_of

from hf_mlx.models.masks import Causal, KeyCache, RowCache, SegmentCache
from hf_mlx.training import blocked_attention as blocks
from hf_mlx.training.blocked_attention import (
    BLOCK,
    CPU_LEAST,
    CUDA_BLOCK,
    LEAST,
    attend_in_blocks,
    attends_in_blocks,
    blocked_attention,
)

# float32 with another order of summation, relative to the largest value.
TOLERANCE = 2e-6

ODD = LEAST + BLOCK // 2 + 3
SHORT = 37
# Of more than one block on CUDA.
LONG = 2 * CUDA_BLOCK + 52


def segments(length):
    return mx.repeat(mx.arange(3), -(-length // 3))[None, :length]


def visible(length):
    return (mx.arange(length) % 7 != 3)[None]


# length, heads, key heads, width, width of values, mask, cache, sinks
CASES = {
    "causal": (LEAST, 2, 2, 8, 8, "causal", None, False),
    "queries share keys, part of a block": (ODD, 4, 2, 8, 8, "causal", None, False),
    "values of another width": (LEAST, 2, 1, 8, 4, "causal", None, False),
    "sinks": (LEAST, 4, 2, 8, 8, "causal", None, True),
    "window": (ODD, 2, 2, 8, 8, create_causal_mask(ODD, window_size=50), None, False),
    "window and sinks": (ODD, 2, 2, 8, 8, create_causal_mask(ODD, window_size=50), None, True),
    "a window that is said": (ODD, 4, 2, 8, 8, None, RowCache(LEAST - 1), False, 50),
    "of two tokens": (LEAST, 2, 2, 8, 8, None, RowCache(LEAST - 1), False, 2),
    "of a block": (ODD, 2, 1, 8, 4, None, RowCache(LEAST - 1), True, BLOCK),
    "of a block and one": (ODD, 2, 2, 8, 8, None, RowCache(LEAST - 1), True, BLOCK + 1),
    "of nearly a row": (ODD, 2, 2, 8, 8, None, RowCache(LEAST - 1), False, ODD - 1),
    "that is said, documents in a row": (ODD, 2, 1, 8, 8, None, SegmentCache(segments(ODD), LEAST - 1), False, 200),
    "documents in a row": (ODD, 2, 1, 8, 8, None, SegmentCache(segments(ODD)), False),
    "hidden keys": (ODD, 2, 1, 8, 8, None, KeyCache(visible(ODD)), False),
    "long": (LONG, 4, 2, 8, 8, "causal", None, False),
    "long, windows with keys before the row": (LONG, 4, 2, 8, 8, None, RowCache(LEAST - 1), False, 200),
    "those, documents in a row": (LONG, 2, 1, 8, 4, None, SegmentCache(segments(LONG), LEAST - 1), False, 512),
    "long, windows wider than a block": (LONG, 2, 1, 8, 8, None, RowCache(LEAST - 1), False, 700),
    "no mask": (LEAST, 2, 2, 8, 8, None, None, False),
    # On the CPU shorter rows are computed at once, and by code of our own where there are no sinks.
    "short": (SHORT, 4, 2, 8, 4, "causal", None, False),
    "short, sinks": (SHORT, 4, 2, 8, 8, "causal", None, True),
    "short, window": (SHORT, 2, 2, 8, 8, create_causal_mask(SHORT, window_size=5), None, False),
    "short, documents in a row": (SHORT, 4, 1, 8, 8, None, SegmentCache(segments(SHORT)), False),
    "short, hidden keys": (SHORT, 4, 2, 8, 8, None, KeyCache(visible(SHORT)), False),
    "short, a mask for each head": (SHORT, 4, 2, 8, 8, mx.arange(4 * SHORT * SHORT).reshape(4, SHORT, SHORT) % 3 > 0,
        None, False),
    "short, queries that see nothing": (SHORT, 2, 1, 8, 8, mx.arange(SHORT)[:, None] > mx.arange(SHORT), None, False),
    "short, no mask": (SHORT, 2, 2, 8, 8, None, None, False),
}  # fmt: skip
ON_CUDA = ("window and sinks", "a window that is said", "that is said, documents in a row", "long",
    "long, windows with keys before the row", "those, documents in a row", "long, windows wider than a block",
)  # fmt: skip


@pytest.mark.parametrize("case, cuda", [*((case, False) for case in CASES), *((case, True) for case in ON_CUDA)])
def test_outputs_and_gradients_are_those_of_all_scores_at_once(case, cuda, monkeypatch):
    # On CUDA blocks are larger.
    monkeypatch.setattr(blocks, "on_cuda", lambda: cuda)
    length, heads, key_heads, width, value_width, mask, cache, with_sinks, window = (*CASES[case], None)[:9]
    mx.random.seed(0)
    shapes = [(2, heads, length, width), (2, key_heads, length, width), (2, key_heads, length, value_width)]
    inputs = [mx.random.normal(shape) for shape in shapes] + ([mx.random.normal((heads,))] if with_sinks else [])
    cotangent = mx.random.normal((2, heads, length, value_width))

    def run(attention):
        def attend(queries, keys, values, *sinks):
            seen = mask if cache is None else cache.make_mask(length, window_size=window)
            if attention is scaled_dot_product_attention and isinstance(seen, Causal):
                seen = seen.between(range(length), range(length))
            if cache is not None:
                keys, values = cache.update_and_fetch(keys, values)
            return attention(queries, keys, values, cache, 0.3, seen, sinks[0] if sinks else None)

        outputs, gradients = mx.compile(lambda *inputs: mx.vjp(attend, list(inputs), [cotangent]))(*inputs)
        return [*outputs, *gradients]

    expected, found = run(scaled_dot_product_attention), run(blocked_attention)

    assert len(found) == len(expected) == 4 + with_sinks
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert mx.abs(one - other).max().item() <= TOLERANCE * mx.abs(other).max().item()


@pytest.mark.parametrize(
    "dtype, widths, fused",
    [
        (mx.bfloat16, (64, 64), True),
        (mx.float16, (128, 128), True),
        (mx.float32, (64, 64), False),
        (mx.bfloat16, (256, 256), False),
        (mx.bfloat16, (192, 128), False),
        (mx.bfloat16, (60, 60), False),
    ],
)
def test_cuda_has_a_kernel_for_heads_that_cudnn_takes(dtype, widths, fused, monkeypatch):
    assert not blocks.is_fused(dtype, *widths)
    monkeypatch.setattr(blocks, "on_cuda", lambda: True)
    assert blocks.is_fused(dtype, *widths) == fused


def test_half_precision_keeps_its_dtype_and_sums_in_float32():
    mx.random.seed(1)
    inputs = [mx.random.normal((1, 2, LEAST, 8)).astype(mx.bfloat16) for _ in range(4)]

    def gradients(attention, arrays):
        *inputs, cotangent = arrays
        attend = lambda *x: attention(*x, None, 0.3, "causal")  # noqa: E731
        return mx.vjp(attend, inputs, [cotangent])[1]

    exact = gradients(scaled_dot_product_attention, [x.astype(mx.float32) for x in inputs])
    at_once, blocked = gradients(scaled_dot_product_attention, inputs), gradients(blocked_attention, inputs)

    for truth, one, other in zip(exact, at_once, blocked, strict=True):
        assert other.dtype == mx.bfloat16
        error = [mx.abs(x.astype(mx.float32) - truth).mean().item() for x in (other, one)]
        # What a block gives is rounded once before it is summed.
        assert error[0] <= 1.25 * error[1]


def test_memory_grows_as_the_length():
    def peak(length):
        inputs = [mx.random.normal((1, 2, length, 8)) for _ in range(3)]
        gradients = mx.compile(mx.grad(lambda *x: blocked_attention(*x, None, 0.3, "causal").sum(), argnums=[0, 1, 2]))
        mx.eval(inputs)
        return peak_of(partial(gradients, *inputs))

    assert peak(4 * LEAST) < 1.2 * 4 * peak(LEAST)


MODELS = {
    "llama": lambda: llama.Model(
        llama.ModelArgs("llama", 16, 2, 32, 2, 1e-5, 32, num_key_value_heads=1, head_dim=8)
    ),
    "gemma3_text": lambda: gemma3_text.Model(
        gemma3_text.ModelArgs("gemma3_text", 16, 2, 32, 2, 8, vocab_size=32, num_key_value_heads=1, sliding_window=64,
            sliding_window_pattern=2,)
    ),
    "gpt_oss": lambda: gpt_oss.Model(
        gpt_oss.ModelArgs(
            hidden_size=16, num_hidden_layers=2, intermediate_size=8, num_attention_heads=2, head_dim=8, vocab_size=32,
            num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1, sliding_window=64,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_model_trains_alike_and_keeps_its_names(name):
    mx.random.seed(2)
    model = MODELS[name]()
    names = sorted(model.parameters())
    ids = mx.random.randint(0, 32, (1, ODD))

    def gradients():
        mx.eval(model.parameters())
        loss, tree = nn.value_and_grad(model, lambda ids: model(ids).astype(mx.float32).logsumexp(-1).mean())(ids)
        return [loss, *(value for _, value in tree_flatten(tree))]

    model.train()
    expected = gradients()
    attend_in_blocks(model.layers)
    found = gradients()

    assert sorted(model.parameters()) == names
    assert all(
        attends_in_blocks(layer, CPU_LEAST) and not attends_in_blocks(layer, CPU_LEAST - 1) for layer in model.layers
    )
    assert len(found) == len(expected) > 10
    for one, other in zip(found, expected, strict=True):
        assert mx.abs(one - other).max().item() <= 2e-5 * max(mx.abs(other).max().item(), 1e-3)
