"""Every model type beside transformers: logits, gradients, names both ways, the head, packed rows; or a refusal.

A run over all types (``make compat``) writes docs/architectures.md.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from architecture_checks import Comparison, compare
from architecture_table import DOCS, MEASURED, record
from architecture_zoo import MODEL_TYPES, make_model

from hf_mlx.errors import ModelError
from hf_mlx.models.architectures import KNOWN_WRONG, VERIFIED, can_pack, look_up

pytestmark = pytest.mark.usefixtures("uncompiled")

# fp32 on both sides with another order of summation: four to seven layers give 1e-7 to 2e-5.
TOLERANCE = 1e-4

# Dense, mixture of experts, windows, softcaps, latent attention, tied and untied: what `make test` looks at.
SAMPLE = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "smollm3", "qwen3_moe", "deepseek_v3")


@pytest.fixture(scope="module")
def rows() -> Iterator[dict[str, Comparison]]:
    """Collects what was measured; a complete, passing set becomes the documentation's table."""
    measured: dict[str, Comparison] = {}
    yield measured
    if set(measured) == set(VERIFIED):
        record(MEASURED, DOCS, passes=measured)


def _cases() -> list:
    return [t if t in SAMPLE else pytest.param(t, marks=pytest.mark.wide) for t in sorted(VERIFIED)]


@pytest.mark.parametrize("model_type", _cases())
def test_a_verified_type_computes_what_transformers_computes(model_type, tmp_path, rows):
    result = compare(make_model(model_type), tmp_path, packs=can_pack(model_type))

    assert result.logits < TOLERANCE
    assert result.loss < TOLERANCE
    assert result.gradient < TOLERANCE, result.worst_tensor
    assert result.tensors > 10
    assert result.missing_on_export == ()
    assert result.changed_on_export == ()
    assert result.head_splits is not False
    assert result.packed is None or result.packed < TOLERANCE
    rows[model_type] = result


@pytest.mark.parametrize("model_type", sorted(KNOWN_WRONG))
def test_a_type_known_to_be_wrong_is_refused_with_its_reason(model_type, tmp_path):
    with pytest.raises(ModelError) as refused:
        look_up({"model_type": model_type}, tmp_path)

    assert KNOWN_WRONG[model_type] in refused.value.received


def test_every_model_type_is_either_verified_or_refused():
    assert set(VERIFIED) | set(KNOWN_WRONG) == set(MODEL_TYPES)
    assert not set(VERIFIED) & set(KNOWN_WRONG)
    assert len(VERIFIED) >= 60
    assert set(SAMPLE) <= set(VERIFIED)
