"""LoRA beside trained ends of a tied vocabulary, the usual Gemma recipe, next to trl: curves, keys, the way back."""

from __future__ import annotations

import warnings
from typing import Any

import mlx.core as mx
import numpy as np
import peft
import pytest
import torch
import transformers
from adapter_pairs import distance
from datasets import Dataset
from pairs import SILENT, rows_of, tiny_model, tokenizer
from peft import LoraConfig
from safetensors.numpy import load_file
from trl import SFTConfig, SFTTrainer

from hf_mlx import MLXSFTTrainer
from hf_mlx.errors import AdapterError

pytestmark = pytest.mark.usefixtures("uncompiled")

NEW = ["<|tool|>", "<|think|>", "<|answer|>"]
ROWS = [{"text": f"{row['text']} {NEW[i % 3]} {i}"} for i, row in enumerate(rows_of("text", 8))]
BOTH = {"r": 4, "target_modules": "all-linear", "modules_to_save": ["lm_head", "embed_tokens"]}
FAMILIES = {
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 512, "query_pre_attn_scalar": 16},
    "cohere2": {"num_hidden_layers": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3},
    "qwen3": {"head_dim": 16},
}


def make_base(family, folder):
    return tiny_model(family, folder, tie_word_embeddings=True, **FAMILIES[family])


def prepared(base, *, as_object):
    """The script's lines before the trainer: with new tokens a model object, else the folder's name."""
    words = transformers.AutoTokenizer.from_pretrained(base)
    if not as_object:
        return str(base), words
    words.add_special_tokens({"additional_special_tokens": NEW})
    torch.manual_seed(11)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(words), mean_resizing=False)
    return model, words


def train(kind, base, folder, lora, *, as_object, resume=None, steps=3):
    model, words = prepared(base, as_object=as_object)
    settings = SILENT | {"max_steps": steps, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "seed": 5}
    settings |= {"logging_steps": 1, "max_length": 48, "save_strategy": "steps", "save_steps": 2}
    with warnings.catch_warnings(action="ignore"):
        trainer = kind(
            model,
            SFTConfig(output_dir=str(folder / "run"), **settings),
            train_dataset=Dataset.from_list(ROWS),
            processing_class=words,
            peft_config=LoraConfig(**lora),
        )
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model(str(folder / "adapter"))
    return trainer


def curve(trainer):
    return [(e["loss"], e["grad_norm"]) for e in trainer.state.log_history if "loss" in e]


def logits_of(model, rows):
    with torch.no_grad():
        return model.eval()(torch.tensor(ids(rows))).logits.numpy()


def ids(rows):
    return np.random.RandomState(1).randint(0, rows, (2, 19))


def loaded_by_peft(base, folder, *, as_object):
    model, _ = prepared(base, as_object=as_object)
    base_model: Any = model if as_object else transformers.AutoModelForCausalLM.from_pretrained(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        return peft.PeftModel.from_pretrained(base_model, folder)


def compare(base, folder, lora, *, as_object):
    """Curve, keys, values, PEFT's reading of ours and a resumed run, all beside trl."""
    theirs: Any = train(SFTTrainer, base, folder / "theirs", lora, as_object=as_object)
    ours = train(MLXSFTTrainer, base, folder / "ours", lora, as_object=as_object)
    np.testing.assert_allclose(curve(ours), curve(theirs), rtol=1e-4)
    files = [load_file(folder / side / "adapter" / "adapter_model.safetensors") for side in ("ours", "theirs")]
    assert files[0].keys() == files[1].keys()
    assert all(files[0][key].shape == value.shape for key, value in files[1].items())
    rows = theirs.model.get_input_embeddings().weight.shape[0]
    read = loaded_by_peft(base, folder / "ours" / "adapter", as_object=as_object)
    expected = logits_of(read, rows)
    assert distance(np.array(ours.session.loaded.model(mx.array(ids(rows)))), expected) <= 1e-5
    assert distance(logits_of(theirs.model, rows), expected) <= 1e-3
    checkpoint = str(folder / "ours" / "run" / "checkpoint-2")
    again = train(MLXSFTTrainer, base, folder / "again", lora, as_object=as_object, resume=checkpoint)
    np.testing.assert_allclose(curve(again), curve(ours), rtol=1e-6)
    return files[0]


WAYS = {"new tokens": True, "by name": False}
SAMPLE = ("gemma2, new tokens", "gemma3_text, by name")
CASES = [(family, way) for family in FAMILIES for way in WAYS]


def marked(cases):
    return [case if ", ".join(case) in SAMPLE else pytest.param(*case, marks=pytest.mark.wide) for case in cases]


@pytest.mark.parametrize(("family", "way"), marked(CASES))
def test_both_ends_in_full_beside_lora_are_trls(family, way, tmp_path):
    as_object = WAYS[way]
    base = make_base(family, tmp_path / "base")
    saved = compare(base, tmp_path, BOTH, as_object=as_object)
    rows = {key: value.shape[0] for key, value in saved.items() if "lora_" not in key}
    assert set(rows.values()) == {len(tokenizer()) + (len(NEW) if as_object else 0)}
    assert len(rows) >= 2


KEPT_TIED = {
    "the head's name": {"modules_to_save": ["lm_head"]},
    "both ends": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "rows": {"trainable_token_indices": [320, 321, 322]},
}


@pytest.mark.parametrize(
    "name", ["the head's name", *(pytest.param(n, marks=pytest.mark.wide) for n in ("both ends", "rows"))]
)
def test_ends_that_stay_tied_are_trls(name, tmp_path, monkeypatch):
    # trl's loss reads the bias of the head, which PEFT's wrapper of trained rows forgets to have.
    monkeypatch.setattr(peft.utils.other.TrainableTokensWrapper, "bias", None, raising=False)
    base = make_base("qwen3", tmp_path / "base")
    lora = {"r": 4, "target_modules": ["q_proj", "down_proj"], "ensure_weight_tying": True, **KEPT_TIED[name]}
    compare(base, tmp_path, lora, as_object=True)


def test_lora_on_ends_that_stay_tied_is_refused(tmp_path):
    base = make_base("qwen3", tmp_path / "base")
    lora = {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}
    with pytest.raises(AdapterError, match="ensure_weight_tying=True with embed_tokens"):
        train(MLXSFTTrainer, base, tmp_path, lora, as_object=False)
