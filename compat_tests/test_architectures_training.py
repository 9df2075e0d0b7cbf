"""Every model type in training beside trl: curves, adapter keys, and what torch makes of the adapter."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import training_checks
from architecture_table import DOCS, MEASURED, record
from pairs import rows_of
from sampling import sampled
from training_checks import EXCLUDED, SETTINGS, Training, compare_training, make_base, train_mlx

from hf_mlx import session
from hf_mlx.errors import AdapterError, ModelError
from hf_mlx.models.architectures import KNOWN_WRONG, VERIFIED, can_pack
from hf_mlx.training import norm_gradients

pytestmark = pytest.mark.usefixtures("uncompiled")

# fp32 on both sides with another order of summation; what is wrong in kind shows at 1e-3 and above.
TOLERANCE = 1e-4

# Dense, windows, fused and Conv1D layers, sinks, experts, latent attention, state-space, gated delta with a vision
# tower beside it: what `make test` looks at.
SAMPLE = ("llama", "gemma3_text", "phi3", "gpt2", "gpt_oss", "qwen3_moe", "deepseek_v3", "mamba", "qwen3_5")


# Their norms have no weight.
WITHOUT_NORMS = ("nanochat", "olmo")


@pytest.fixture(scope="module")
def rows() -> Iterator[dict[str, Training]]:
    """Collects what was measured; more than half of the types go into the documentation's table."""
    measured: dict[str, Training] = {}
    yield measured
    if len(measured) > len(VERIFIED) / 2:
        record(MEASURED, DOCS, training=measured)


def _cases(names) -> list:
    return [t if t in SAMPLE else pytest.param(t, marks=pytest.mark.wide) for t in sorted(names)]


@pytest.mark.parametrize("model_type", _cases(VERIFIED))
def test_all_linear_trains_with_trls_curve_and_the_adapter_is_pefts(model_type, tmp_path, rows):
    result = compare_training(model_type, tmp_path)

    assert result.loss < TOLERANCE
    assert result.grad_norm < TOLERANCE
    assert result.other_keys == ()
    assert result.keys >= 8
    assert result.evaluation < TOLERANCE
    # An adapter that stands still would agree with anything; Adam moves each value by about the learning rate.
    assert result.moved > 1e-4
    rows[model_type] = result


@pytest.mark.parametrize("model_type", sampled(sorted(VERIFIED), "gemma3_text", "gpt2", "qwen3_5"))
def test_norms_as_a_gpu_computes_them_train_with_trls_curve(model_type, tmp_path, monkeypatch):
    """RMS and layer norms, plain, around 1 and gated, whose weights are frozen."""
    replaced = []

    def improve(model):
        before = [type(module) for module in model.modules()]
        norm_gradients.improve_norms(model)
        replaced.extend(kind for kind, module in zip(before, model.modules(), strict=True) if type(module) is not kind)

    monkeypatch.setattr(norm_gradients, "on_cpu", lambda: False)
    monkeypatch.setattr(session, "improve_norms", improve)
    result = compare_training(model_type, tmp_path)

    assert max(result.loss, result.grad_norm, result.evaluation) < TOLERANCE
    assert result.moved > 1e-4
    assert bool(replaced) == (model_type not in WITHOUT_NORMS)


@pytest.mark.parametrize("model_type", ["qwen3_5_text", pytest.param("kimi_linear", marks=pytest.mark.wide)])
def test_rows_of_several_chunks_train_with_trls_curve(model_type, tmp_path, monkeypatch):
    """Gated delta layers run by chunks of 64 tokens; the last one is not full."""
    rows = [{"text": " ".join(row["text"] for row in rows_of("text", 12, seed=seed))[:180]} for seed in range(4)]
    monkeypatch.setattr(training_checks, "ROWS", rows)
    monkeypatch.setitem(SETTINGS, "max_length", 160)
    result = compare_training(model_type, tmp_path)

    assert max(result.loss, result.grad_norm, result.evaluation) < TOLERANCE
    assert result.other_keys == ()
    assert result.moved > 1e-4


PACKED = {
    "packing": ({"packing": True}, "packing=True"),
    "padding_free": ({"padding_free": True, "max_length": None}, "padding_free=True"),
}


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("model_type", ["gpt2", "mamba", "qwen3_5_text"])
def test_packed_rows_are_refused_where_documents_would_see_each_other(model_type, name, tmp_path):
    settings, words = PACKED[name]
    base = make_base(model_type, tmp_path / "base")

    with pytest.raises(ModelError, match=words) as refused:
        train_mlx(base, tmp_path / "ours", {"target_modules": "all-linear"} | _without(model_type), settings=settings)

    assert not can_pack(model_type)
    assert "SFTConfig(" in refused.value.remedy


def test_rows_that_were_packed_before_are_refused_too(tmp_path):
    from datasets import Dataset

    base = make_base("gpt2", tmp_path / "base")
    rows = Dataset.from_list([{"input_ids": [5, 6, 7, 8, 9, 10], "seq_lengths": [2, 4]}] * 4)
    settings = {"padding_free": True, "max_length": None}

    with pytest.raises(ModelError, match="padding_free=True"):
        train_mlx(base, tmp_path / "ours", {"target_modules": "all-linear"}, train_dataset=rows, settings=settings)


def test_wrapped_packing_keeps_nothing_apart_and_so_trains(tmp_path):
    base = make_base("gpt2", tmp_path / "base")

    trainer = train_mlx(
        base,
        tmp_path / "ours",
        {"target_modules": "all-linear"},
        settings={"packing": True, "packing_strategy": "wrapped", "max_length": 8},
    )

    assert trainer.state.global_step == SETTINGS["max_steps"]


@pytest.mark.parametrize("model_type", sorted(KNOWN_WRONG))
def test_a_type_that_is_not_right_does_not_train(model_type, tmp_path):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        pytest.skip("this transformers has no such type to save")
    if model_type == "gemma3n" and find_spec("timm") is None:
        pytest.skip("transformers builds its vision tower with timm, which is not installed")
    base = make_base(model_type, tmp_path / "base")

    with pytest.raises((ModelError, AdapterError), match="received"):
        train_mlx(base, tmp_path / "ours", {"target_modules": "all-linear"})


def test_how_many_types_train():
    assert len(VERIFIED) >= 91
    assert set(SAMPLE) <= set(VERIFIED)


def _without(model_type: str) -> dict:
    return {"exclude_modules": EXCLUDED[model_type]} if model_type in EXCLUDED else {}
