"""Gated-delta and state-space layers over several chunks, the last one not full, beside transformers."""

from __future__ import annotations

import pytest
import torch
from architecture_checks import compare
from architecture_zoo import VOCAB, make_model

pytestmark = pytest.mark.usefixtures("uncompiled")

# fp32 with another order of summation, relative to the largest value. Gradients are held to the same bound against
# those that torch computes in float64: in fp32 torch's own are up to 5e-5 off (A_log: four numbers that sum over 300
# tokens what largely cancels).
TOLERANCE = 2e-5
TOKENS = 150

SAMPLE = ("qwen3_5_text", "kimi_linear", "mamba", "mamba2")
WIDE = ("falcon_mamba", "granitemoehybrid", "jamba", "nemotron_h", "olmo_hybrid", "qwen3_5_moe_text", "qwen3_next")
# How key and value heads and widths relate; groups of a state space.
OPTIONS = {
    "qwen3_5_text": {"linear_num_key_heads": 1, "linear_key_head_dim": 16},
    "qwen3_next": {"linear_num_key_heads": 4, "linear_value_head_dim": 16},
    "mamba2": {"n_groups": 1},
    "nemotron_h": {"n_groups": 1},
}
CASES = [
    *[(t, {}) for t in SAMPLE],
    *[pytest.param(t, {}, marks=pytest.mark.wide) for t in WIDE],
    *[pytest.param(t, options, marks=pytest.mark.wide) for t, options in OPTIONS.items()],
]


@pytest.mark.parametrize(("model_type", "options"), CASES)
def test_several_chunks_are_what_transformers_computes(model_type, options, tmp_path):
    model = make_model(model_type, max_position_embeddings=256, **options)
    ids = torch.randint(3, VOCAB, (2, TOKENS), generator=torch.Generator().manual_seed(5))

    found = compare(model, tmp_path, ids=ids, exact=True)

    assert found.logits < TOLERANCE
    assert found.loss < TOLERANCE
    assert found.gradient < TOLERANCE, found.worst_tensor
    assert found.tensors > 20
