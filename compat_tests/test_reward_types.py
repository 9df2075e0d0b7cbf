"""Every model type that is given a score: rewards and their training are transformers' and trl's."""

import pytest
from architecture_zoo import make_model
from pairs import tokenizer
from reward_pairs import assert_same_log, reward_rows, run_both
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from hf_mlx.models.architectures import VERIFIED
from hf_mlx.models.scoring import SCORED

FEW = ("gemma3_text", "mixtral", "qwen3")
SETTINGS = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-3}
LORA = {"r": 2, "task_type": "SEQ_CLS", "target_modules": "all-linear"}


def test_the_classes_are_transformers():
    assert len(SCORED) >= 32
    for name, stem in SCORED.items():
        assert MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES[name] == f"{stem}ForSequenceClassification"
        assert name in VERIFIED


@pytest.mark.parametrize(
    "model_type", [name if name in FEW else pytest.param(name, marks=pytest.mark.wide) for name in SCORED]
)
def test_training_is_trls(model_type, tmp_path):
    folder = tmp_path / "model"
    ids = {"vocab_size": len(tokenizer()), "pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1}
    make_model(model_type, **ids).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    rows = reward_rows("text", 6)
    theirs, ours = run_both(folder, SETTINGS, rows, "name", LORA)
    compared = assert_same_log(theirs, ours, relative=1e-4, loss=1e-5)
    # Adam steps by the sign of a gradient that is rounding alone.
    settings = {**SETTINGS, "optim": "sgd", "learning_rate": 1e-2}
    theirs, ours = run_both(folder, settings, rows, "name, full", LORA)
    assert compared + assert_same_log(theirs, ours, relative=1e-4, loss=1e-5) >= 60


@pytest.mark.wide
def test_long_rows_under_a_window_are_trls(tmp_path):
    folder = tmp_path / "model"
    ids = {"vocab_size": len(tokenizer()), "pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1}
    make_model("mistral", **ids, sliding_window=100, max_position_embeddings=2048).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    rows = [{key: value * 50 for key, value in row.items()} for row in reward_rows("text", 4)]
    lengths = [len(tokenizer()(row[key])["input_ids"]) for row in rows for key in ("chosen", "rejected")]
    assert max(lengths) > 600
    settings = {**SETTINGS, "max_steps": 2, "max_length": None}
    theirs, ours = run_both(folder, settings, rows, "name", LORA)
    assert assert_same_log(theirs, ours, relative=1e-4, loss=1e-5) >= 15
