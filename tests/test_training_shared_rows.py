"""Attention of two answers in one row: outputs and gradients are those of two sequences, and padding gets none."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from hf_mlx.data.pairs import collate_pairs
from hf_mlx.data.prompts import share_prompts
from hf_mlx.training.blocked_attention import blocked_attention
from hf_mlx.training.shared_rows import PromptCache

HEADS, KEY_HEADS, SIZE, SCALE = 4, 2, 8, 0.3
# Tokens of prompt, chosen and rejected answer of each pair.
CASES = {
    "uneven": [(30, 5, 9), (14, 9, 3), (20, 7, 7)],
    "a prompt of one token": [(1, 40, 2), (60, 2, 2)],
    "sequences without padding": [(33, 31, 31), (60, 4, 4), (40, 24, 12)],
    "answers longer than prompts": [(28, 34, 32), (20, 40, 24)],
}


def attend(queries, keys, values, mask):
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=SCALE, mask=mask)


@pytest.mark.parametrize("window", [None, 10])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_two_sequences(case, window):
    rng, sizes = np.random.default_rng(0), CASES[case]
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [{name: rng.integers(5, 60, n).tolist() for name, n in zip(names, each, strict=True)} for each in sizes]
    shared = share_prompts(collate_pairs(rows, pad_token_id=2, max_length=None), 2)
    assert shared is not None
    pairs, width = shared.input_ids.shape
    cache = PromptCache(*(mx.array(getattr(shared, name)) for name in ("offsets", "slots", "rejected")))
    inputs = [mx.random.normal((pairs * width, heads, 1, SIZE)) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    used = np.array([prompt - 1 + chosen + 1 + rejected + 1 for prompt, chosen, rejected in sizes])
    is_token = mx.array((np.arange(width) < used[:, None]).reshape(-1, 1, 1, 1))
    cotangent = mx.where(is_token, mx.random.normal((pairs * width, HEADS, 1, SIZE)), 0)

    def found(*inputs):
        return blocked_attention(*inputs, cache, SCALE, cache.make_mask(1, window_size=window))

    def expected(*inputs):
        outputs = []
        for pair, (prompt, chosen, rejected) in enumerate(sizes):
            prompt, chosen, rejected = prompt - 1, chosen + 1, rejected + 1
            whole = [x[pair * width : (pair + 1) * width, :, 0].swapaxes(0, 1)[None] for x in inputs]
            parts = []
            for begin, end in ((prompt, prompt + chosen), (prompt + chosen, prompt + chosen + rejected)):
                sequence = [mx.concatenate([x[:, :, :prompt], x[:, :, begin:end]], axis=2) for x in whole]
                behind = mx.arange(sequence[0].shape[2])[:, None] - mx.arange(sequence[0].shape[2])
                seen = behind >= 0 if window is None else (behind >= 0) & (behind < window)
                parts.append(attend(*sequence, seen)[0].swapaxes(0, 1))
            padding = mx.zeros((width - prompt - chosen - rejected, HEADS, SIZE))
            outputs += [parts[0], parts[1][prompt:], padding]
        return mx.concatenate(outputs)[:, :, None]

    results = []
    for function in (expected, found):
        outputs, gradients = mx.compile(lambda *x, f=function: mx.vjp(f, list(x), [cotangent]))(*inputs)
        results.append([mx.where(is_token, outputs[0], 0), *gradients])
    for one, other in zip(*results, strict=True):
        assert one.shape == other.shape
        assert mx.abs(one - other).max().item() <= 2e-6 * mx.abs(one).max().item()
    assert all(not mx.where(is_token, 0, x).any().item() for x in results[1])
