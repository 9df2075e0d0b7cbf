"""Two runs of one script: trl.SFTTrainer on torch's CPU and MLXSFTTrainer, from the same files and settings."""

from __future__ import annotations

import contextlib
import io
import logging
import random
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from hf_mlx import MLXSFTTrainer

# What depends on the clock, not on the numbers.
TIMED = ("runtime", "per_second")
SILENT = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_theta": 5000.0},
    "qwen2": {"rope_theta": 5000.0, "tie_word_embeddings": True},
    "qwen3": {"rope_theta": 5000.0, "head_dim": 16},
    "mistral": {"rope_theta": 5000.0, "sliding_window": None},
    "gemma3_text": {"head_dim": 16, "sliding_window": 512, "query_pre_attn_scalar": 16},
    "phi3": {"rope_theta": 5000.0, "pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1},
    "olmo2": {"rope_theta": 5000.0, "pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1},
    "smollm3": {"rope_theta": 5000.0, "pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1},
}


@cache
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE of 320 entries with a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    special = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([row["text"] for row in text_rows(60)], trainer)
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    made.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    return made


def tiny_model(family: str, folder: Path, *, seed: int = 0, dtype: str = "float32", **options: Any) -> Path:
    """A two-layer model of ``family`` with every parameter perturbed, saved with its tokenizer."""
    sizes = {
        "vocab_size": len(tokenizer()),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    config = transformers.AutoConfig.for_model(family, **{**sizes, **FAMILIES.get(family, {}), **options})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def text_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows of text of uneven length."""
    draw = random.Random(seed)
    words = ["the", "model", "learns", "a", "curve", "and", "writes", "what", "it", "means", "to", "each", "of", "us"]
    return [{"text": " ".join(draw.choices(words, k=draw.randint(2, 14))) + f" {i}"} for i in range(count)]


def rows_of(kind: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """``count`` rows as ``text``, ``prompt`` (prompt + completion) or ``messages``."""
    texts = [row["text"] for row in text_rows(2 * count, seed)]
    asked, answered = texts[:count], texts[count:]
    if kind == "text":
        return [{"text": text} for text in asked]
    if kind == "prompt":
        return [{"prompt": a + "\n", "completion": b} for a, b in zip(asked, answered, strict=True)]
    turns = [[("user", a), ("assistant", b)] for a, b in zip(asked, answered, strict=True)]
    return [{"messages": [{"role": role, "content": content} for role, content in turn]} for turn in turns]


@dataclass
class Run:
    """What a run left behind.

    Attributes:
        history: ``state.log_history``.
        weights: Trained arrays under PEFT's (or HF's) names.
    """

    history: list[dict[str, float]]
    weights: dict[str, np.ndarray] = field(default_factory=dict)


def run_trl(model: Any, settings: dict[str, Any], rows: Any, lora: dict[str, Any] | None, **keywords: Any) -> Run:
    """TRL's run of the script."""
    with _quiet() as folder:
        trainer = SFTTrainer(
            _fresh(model),
            SFTConfig(output_dir=folder, **{**SILENT, **settings}),
            train_dataset=_dataset(rows),
            peft_config=LoraConfig(**lora) if lora else None,
            **keywords,
        )
        trainer.train()
    named = trainer.model.named_parameters()
    weights = {_short(k): p.detach().float().numpy() for k, p in named if p.requires_grad}
    return Run(trainer.state.log_history, weights)


def run_mlx(model: Any, settings: dict[str, Any], rows: Any, lora: dict[str, Any] | None, **keywords: Any) -> Run:
    """Our run of the same script."""
    with _quiet() as folder:
        trainer = MLXSFTTrainer(
            _fresh(model),
            SFTConfig(output_dir=folder, **{**SILENT, **settings}),
            train_dataset=_dataset(rows),
            peft_config=LoraConfig(**lora) if lora else None,
            **keywords,
        )
        trainer.train()
    session = trainer.session
    weights = {_short(session.hf_name(k)): _numpy(v) for k, v in session.step.params.items()}
    # Pairs around what no token reaches: parameters in torch, which nothing moves.
    weights |= {_short(k): _numpy(v) for k, v in getattr(trainer.adapter, "idle", {}).items()}
    return Run(trainer.state.log_history, weights)


def run_both(
    model: Any, settings: dict[str, Any], rows: Any, lora: dict[str, Any] | None, **keywords: Any
) -> tuple[Run, Run]:
    """TRL's run and ours."""
    return run_trl(model, settings, rows, lora, **keywords), run_mlx(model, settings, rows, lora, **keywords)


def assert_same_curve(theirs: Run, ours: Run, *, relative: float, weights: float) -> int:
    """Assert that every log entry agrees, has the same keys, and that the trained arrays end alike.

    Args:
        relative: Largest relative difference of a logged value; below 1e-3 the difference is taken at that scale.
        weights: Largest absolute difference of a trained array.

    Returns:
        How many logged values were compared.
    """
    compared = 0
    assert len(theirs.history) == len(ours.history)
    for a, b in zip(theirs.history, ours.history, strict=True):
        assert _timeless(a).keys() == _timeless(b).keys(), f"step {a['step']}: {set(a) ^ set(b)}"
        for key, value in _timeless(a).items():
            difference = abs(value - b[key]) / max(abs(value), 1e-3)
            assert difference <= relative, f"step {a['step']}: {key} is {b[key]!r}, TRL has {value!r}"
            compared += 1
    assert theirs.weights.keys() == ours.weights.keys()
    for key, value in theirs.weights.items():
        assert np.abs(value - ours.weights[key]).max() <= weights, key
    return compared


def untimed(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A log without what a clock makes."""
    left_out = (*TIMED, "total_flos", "preparation")
    return [{k: v for k, v in entry.items() if not any(part in k for part in left_out)} for entry in history]


def assert_same_log(
    theirs: list[dict[str, Any]], ours: list[dict[str, Any]], *, relative: float, nan_ok: bool = False
) -> None:
    """Entry by entry the same keys in the same order, and the same values."""
    assert len(theirs) == len(ours)
    for a, b in zip(theirs, ours, strict=True):
        assert list(a) == list(b)
        for key, value in a.items():
            assert b[key] == pytest.approx(value, rel=relative, abs=1e-7, nan_ok=nan_ok), (key, a, b)


def mean_drift(theirs: Run, ours: Run, key: str = "loss") -> float:
    """Mean signed difference of a logged value: an accumulation bug is one-sided."""
    pairs = [(a[key], b[key]) for a, b in zip(theirs.history, ours.history, strict=True) if key in a]
    return float(np.mean([b - a for a, b in pairs]))


def _timeless(entry: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in entry.items() if not any(part in k for part in TIMED) and k != "total_flos"}


def _short(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".default", "").replace("modules_to_save.", "")


def _numpy(array: Any) -> np.ndarray:
    import mlx.core as mx

    return np.array(array.astype(mx.float32))


def _dataset(rows: Any) -> Any:
    return Dataset.from_list(rows) if isinstance(rows, list) else rows


def _fresh(model: Any) -> Any:
    return model() if isinstance(model, Callable) else str(model)


@contextlib.contextmanager
def _quiet():
    """A temporary output folder, without TRL's warnings and progress on the terminal."""
    logging.disable(logging.WARNING)
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield folder
    finally:
        logging.disable(logging.NOTSET)
