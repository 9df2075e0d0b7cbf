"""A prompt that both answers share is computed once: the same numbers as TRL's, which computes it twice."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from datasets import Dataset
from pairs import tiny_model
from preference_pairs import assert_same_log, preference_rows, run_both
from training_checks import make_base

import hf_mlx.recipes.dpo as recipe
from hf_mlx.data.batch import IGNORE
from hf_mlx.data.pairs import collate_pairs
from hf_mlx.data.preference import ID_COLUMNS
from hf_mlx.data.prompts import pair_width, share_prompts
from hf_mlx.models.architectures import VERIFIED, can_pack
from hf_mlx.models.heads import layers
from hf_mlx.models.load import load_model
from hf_mlx.settings.plan import ModelPlan
from hf_mlx.training import shared_rows
from hf_mlx.training.blocked_attention import attend_in_blocks
from hf_mlx.training.shared_rows import prompt_cache, shares_prompts

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
SETTINGS = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 4, "learning_rate": 2e-3}


def long_prompts(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows whose prompts are several times as long as their answers."""
    rows, fronts = preference_rows("text", count, seed), preference_rows("text", 4 * count, seed + 100)
    return [{**row, "prompt": " ".join(f["chosen"] for f in fronts[i::count]) + "\n"} for i, row in enumerate(rows)]


@pytest.fixture
def laid(monkeypatch) -> list[bool]:
    """Of each batch, whether its prompts were shared."""
    seen: list[bool] = []

    def share(*args, **keywords):
        found = share_prompts(*args, **keywords)
        seen.append(found is not None)
        return found

    monkeypatch.setattr(recipe, "share_prompts", share)
    return seen


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    ("family", "reference", "settings"),
    [
        ("llama", "adapter off", {"loss_type": ["sigmoid", "sft"], "ld_alpha": 0.3}),
        pytest.param(
            "gemma3_text",
            "full",
            {"gradient_checkpointing": True, "loss_type": ["aot_unpaired"]},
            marks=pytest.mark.wide,
        ),
        pytest.param("qwen2", "precomputed", {"use_weighting": True, "loss_type": ["ipo"]}, marks=pytest.mark.wide),
    ],
)
def test_training_equals_trls(tmp_path, laid, family, reference, settings):
    # Gemma's window is shorter than the prompts.
    options = {"sliding_window": 24} if family == "gemma3_text" else {}
    model = tiny_model(family, tmp_path, **options)
    evaluation = Dataset.from_list(long_prompts(5, seed=3))
    settings = {**SETTINGS, "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 2, **settings}
    theirs, ours = run_both(model, settings, long_prompts(13), reference, LORA, eval_dataset=evaluation)
    assert assert_same_log(theirs, ours, relative=1e-4, loss=1e-5, reference=reference) >= 84
    assert laid.count(True) >= 8 and laid.count(False) <= 6


def make_rows(rng: np.random.Generator, count: int, longest: tuple[int, int]) -> list[dict[str, list[int]]]:
    sizes = rng.integers(1, [longest[0], longest[1], longest[1]], (count, 3), endpoint=True)
    return [
        {name: rng.integers(5, 300, size).tolist() for name, size in zip(ID_COLUMNS, row, strict=True)} for row in sizes
    ]


def test_every_token_and_target_is_where_it_was():
    rng, shared = np.random.default_rng(0), 0
    for _ in range(200):
        longest = (int(rng.integers(1, 400)), int(rng.integers(1, 90)))
        rows = make_rows(rng, int(rng.integers(1, 6)), longest)
        max_length = int(rng.choice([longest[0] + 1, longest[0] + 30, 600]))
        mode = str(rng.choice(["keep_start", "keep_end"]))
        batch = collate_pairs(rows, pad_token_id=2, max_length=max_length, truncation_mode=mode)
        found = share_prompts(batch, 2)
        if found is None:
            continue
        shared += 1
        assert found.input_ids.size < len(batch.lengths) * pair_width(int(batch.lengths.max()), len(batch.lengths))
        for pair, split in enumerate(found.splits[:, 0]):
            row, offsets, used = found.input_ids[pair], found.offsets[pair], 0
            for place, begin in ((0, 0), (1, split)):
                length = batch.lengths[2 * pair + place]
                at = np.arange(length) if place == 0 else found.rejected[pair, :length]
                assert np.array_equal(row[at], batch.input_ids[2 * pair + place, :length])
                assert np.array_equal(offsets[at], np.arange(length))
                targets = np.where(at >= begin, found.targets[pair, at], IGNORE)
                assert np.array_equal(targets[:-1], batch.labels[2 * pair + place, 1:length])
                used += (targets != IGNORE).sum()
            assert used == (found.targets[pair] != IGNORE).sum()
    assert shared >= 50


def test_prompts_that_differ_are_left_alone():
    rows = make_rows(np.random.default_rng(1), 3, (200, 20))
    # Cut at their front, answers of different lengths leave different parts of the prompt.
    cut = collate_pairs(rows, pad_token_id=2, max_length=30, truncation_mode="keep_end")
    assert share_prompts(cut, 2) is None
    assert share_prompts(collate_pairs(rows, pad_token_id=2, max_length=None), 2) is not None


# Their attention has scores of its own.
ALONE = {"deepseek_v2", "deepseek_v3", "gemma2", "glm4_moe_lite", "minicpm3"}
TYPES = [name for name in VERIFIED if can_pack(name)]


def test_narrow_rotary_embeddings_are_computed_apart_on_cuda(tmp_path, monkeypatch):
    # As of GPT-NeoX, where a quarter of a head is turned: MLX has no kernel for its rows of one token there.
    loaded = load_model(str(make_base("llama", tmp_path)), ModelPlan())
    attend_in_blocks(layers(loaded.model))
    ropes = [layer.self_attn.rope for layer in layers(loaded.model)]
    found = {}
    for on_cuda in (False, True):
        monkeypatch.setattr(shared_rows, "on_cuda", lambda on_cuda=on_cuda: on_cuda)
        for dims in (16, 32):
            for rope in ropes:
                rope.dims = dims
            found[on_cuda, dims] = shares_prompts(loaded)
    assert found == {(False, 16): True, (False, 32): True, (True, 16): False, (True, 32): True}


def check_type(model_type: str, folder) -> None:
    """Logits of two answers in one row are those of two rows."""
    loaded = load_model(str(make_base(model_type, folder / "base")), ModelPlan())
    model = loaded.model
    attend_in_blocks(layers(model))
    assert shares_prompts(loaded) == (model_type not in ALONE)
    if model_type in ALONE:
        return
    rows = make_rows(np.random.default_rng(0), 3, (40, 7))
    shared = share_prompts(collate_pairs(rows, pad_token_id=2, max_length=None), 2)
    cache = prompt_cache(model, *(mx.array(getattr(shared, name)) for name in ("offsets", "slots", "rejected")))
    found = model(mx.array(shared.input_ids).reshape(-1, 1), cache=cache).reshape(*shared.input_ids.shape, -1)
    for pair, row in enumerate(rows):
        for name, begin in (("chosen_ids", len(row["prompt_ids"]) - 1), ("rejected_ids", shared.splits[pair, 0])):
            whole = model(mx.array([row["prompt_ids"] + row[name]]))[0, len(row["prompt_ids"]) - 1 :]
            got = found[pair, int(begin) : int(begin) + len(whole)]
            np.testing.assert_allclose(np.array(got), np.array(whole), atol=1e-5 * float(mx.abs(whole).max()))


@pytest.mark.parametrize("model_type", ["cohere2", "gemma2", "gpt_oss"])
def test_types_share_prompts(model_type, tmp_path):
    check_type(model_type, tmp_path)


@pytest.mark.wide
@pytest.mark.parametrize("model_type", TYPES)
def test_all_types_share_prompts(model_type, tmp_path):
    check_type(model_type, tmp_path)


def test_rotary_embeddings_that_compare_positions_are_left_alone(tmp_path):
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 64}
    longrope = {"rope_type": "longrope", "rope_theta": 10000.0, **factors}
    tiny_model("phi3", tmp_path, rope_parameters=longrope, max_position_embeddings=128)
    loaded = load_model(str(tmp_path), ModelPlan())
    attend_in_blocks(layers(loaded.model))
    assert not shares_prompts(loaded)
