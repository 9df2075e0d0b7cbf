"""Configurations drawn among what real checkpoints vary: transformers' logits, or a refusal by name."""

from __future__ import annotations

import os

import pytest
from variant_draws import answer, draw

from hf_mlx.models.architectures import VERIFIED

# fp32 with another order of summation; an option that is ignored shows at 1e-3 and above.
TOLERANCE = 1e-4
DRAWS = 4
#: Another seed draws others.
FIRST = DRAWS * int(os.environ.get("HF_MLX_SEED", "0"))
SAMPLE = ("cohere2", "deepseek_v3", "exaone4", "gpt_oss", "llama", "qwen3_next")


@pytest.mark.parametrize(
    "model_type", [t if t in SAMPLE else pytest.param(t, marks=pytest.mark.wide) for t in sorted(VERIFIED)]
)
def test_every_draw_is_computed_or_refused(model_type, tmp_path):
    drawn = [(number, draw(model_type, number)) for number in range(FIRST, FIRST + DRAWS)]
    answers = {number: answer(model_type, changes, tmp_path / str(number)) for number, changes in drawn}

    known = {number: found for number, found in answers.items() if found is not None}
    computed = {number: found for number, found in known.items() if not isinstance(found, str)}
    # A refusal names the option.
    assert all("config.json has" in found or "weights" in found for found in known.values() if isinstance(found, str))
    assert {number: found for number, found in computed.items() if found > TOLERANCE} == {}
    # transformers itself fails on the others.
    assert known


def test_how_many_are_drawn():
    assert DRAWS * len(VERIFIED) >= 300
    assert len({str(draw(t, n)) for t in VERIFIED for n in range(DRAWS)}) >= 150
