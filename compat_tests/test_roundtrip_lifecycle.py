"""One adapter's whole life, for drawn LoraConfigs: save, resume, load the best, import, merge, verify, load in PEFT."""

import contextlib
import copy
import io
import logging
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import peft
import pytest
import torch
from adapter_pairs import adapt_torch, load_mlx, load_torch, logits_mlx, logits_torch
from adapter_pairs import make_base as make_tied
from datasets import Dataset
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from sampling import sampled
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from hf_mlx import MLXSFTTrainer, verify_adapter
from hf_mlx.adapters.export import export_adapter
from hf_mlx.adapters.merge import merge_adapter
from hf_mlx.adapters.read import import_adapter
from hf_mlx.models.load import load_model
from hf_mlx.settings.plan import ModelPlan

pytestmark = pytest.mark.usefixtures("uncompiled")

WORDS = [f"w{i}" for i in range(57)]
ROWS_OF_TABLE = 60
NEW = [AddedToken("<tool>"), AddedToken("</tool>")]
# fp32 on both sides, sums in another order, through two layers.
CLOSE = 2e-5
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ENDS = ["embed_tokens", "lm_head"]


@dataclass
class Case:
    """What is drawn: the base, how the script resizes it, and the LoraConfig."""

    tied: bool
    resize: dict[str, int] | None
    lora: dict[str, Any] = field(default_factory=dict)


@st.composite
def cases(draw):
    """LoraConfigs that PEFT trains and saves."""
    tied = draw(st.booleans())
    resizes = [None, {"new_num_tokens": 62}, {"new_num_tokens": 50}, {"new_num_tokens": 62, "pad_to_multiple_of": 16}]
    names = draw(st.lists(st.sampled_from(LINEAR), min_size=1, max_size=3, unique=True))
    kind = draw(st.sampled_from(["names", "names and ends", "regex", "paths", "all-linear"]))
    ends = (
        draw(st.lists(st.sampled_from(ENDS), min_size=1, max_size=2, unique=True)) if kind == "names and ends" else []
    )
    targets: Any = {
        "regex": rf".*\.[01]\.(self_attn|mlp)\.({'|'.join(names)})",
        "paths": [f"model.layers.1.{'mlp' if name[0] in 'gud' else 'self_attn'}.{name}" for name in names],
        "all-linear": "all-linear",
    }.get(kind, [*names, *ends])
    lora: dict[str, Any] = {
        "target_modules": targets,
        "r": draw(st.integers(1, 5)),
        "lora_alpha": draw(st.sampled_from([1, 7, 16])),
        "use_rslora": draw(st.booleans()),
        "init_lora_weights": draw(st.sampled_from([True, False, "gaussian"])),
        "lora_dropout": draw(st.sampled_from([0.0, 0.2])),
    }
    saved = draw(st.lists(st.sampled_from([*ENDS, "norm", "input_layernorm"]), max_size=2, unique=True))
    if saved := [name for name in saved if name not in ends]:
        lora["modules_to_save"] = saved
    if not ends and not set(saved) & set(ENDS) and draw(st.booleans()):
        tokens = draw(st.lists(st.integers(0, 49), min_size=1, max_size=4, unique=True))
        both = {"embed_tokens": tokens, "lm_head": tokens}
        lora["trainable_token_indices"] = draw(st.sampled_from([tokens, {"embed_tokens": tokens}, both]))
    if not ends:
        lora["use_dora"] = draw(st.booleans())
    lora["bias"] = draw(st.sampled_from(["none", "lora_only", "all"]))
    for name, values in (("rank_pattern", st.integers(1, 6)), ("alpha_pattern", st.sampled_from([2, 9]))):
        keys = st.sampled_from([*LINEAR, r"1\.self_attn\.q_proj", "nothing"])
        lora[name] = draw(st.dictionaries(keys, values, max_size=2))
    if kind.startswith("names"):
        lora["layers_to_transform"] = None if ends else draw(st.sampled_from([None, [0], [0, 1]]))
        lora["exclude_modules"] = draw(
            st.sampled_from([None, [f"1.{'self_attn' if names[0][0] in 'qkvo' else 'mlp'}"]])
        )
    return Case(tied, draw(st.sampled_from(resizes)), lora)


def make_base(folder, tied):
    """A tiny Llama with biases, and a tokenizer of one token a word."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=ROWS_OF_TABLE, attention_bias=True, tie_word_embeddings=tied, **sizes, **ids)
    )
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.05 * torch.randn_like(value))
    model.save_pretrained(folder)
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<s>", "</s>", "<pad>", *WORDS])}, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.save_pretrained(folder)
    return folder, tokenizer


@contextlib.contextmanager
def silence():
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(level)


def make_trainer(kind, case, base, tokenizer, output_dir, *, seed=3):
    """The script: load, add tokens, resize, train a LoRA; ``seed`` is that of the new rows."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = copy.deepcopy(tokenizer)
    tool = "w3"
    if case.resize is not None:
        torch.manual_seed(seed)
        model.resize_token_embeddings(**case.resize, mean_resizing=False)
        if case.resize["new_num_tokens"] > ROWS_OF_TABLE:
            tokenizer.add_tokens(NEW)
            tool = "<tool>"
    rows = Dataset.from_list([{"text": f"{tool} w{i % 40} w{i % 7} w5 w{3 * i % 40}"} for i in range(8)])
    arguments = SFTConfig(
        output_dir=str(output_dir), max_steps=4, save_strategy="steps", save_steps=2, eval_strategy="steps",
        eval_steps=2, load_best_model_at_end=True, learning_rate=1e-2, logging_steps=1, seed=3,
        per_device_train_batch_size=2, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
        disable_tqdm=True,
    )  # fmt: skip
    return kind(
        model=model,
        args=arguments,
        processing_class=tokenizer,
        train_dataset=rows,
        eval_dataset=rows,
        peft_config=peft.LoraConfig(**copy.deepcopy(case.lora), task_type="CAUSAL_LM"),
    )


def losses(trainer):
    return [e.get("loss", e.get("eval_loss")) for e in trainer.state.log_history if {"loss", "eval_loss"} & e.keys()]


def ids(rows):
    return np.array([[0, 5, rows - 1, 9, 33, rows - 2, 7]])


def logits_of(model, rows):
    with torch.no_grad():
        return model.eval()(torch.tensor(ids(rows))).logits.numpy()


def distance(a, b):
    return float(np.abs(a - b).max() / np.abs(b).max())


def live(case, folder):
    """All of it; asserts at every station."""
    base, tokenizer = make_base(folder / "base", case.tied)
    trainer = make_trainer(MLXSFTTrainer, case, base, tokenizer, folder / "run")
    trainer.train()
    # New rows of other values, as a script without a seed draws them: the checkpoint's count.
    again = make_trainer(MLXSFTTrainer, case, base, tokenizer, folder / "run", seed=4)
    again.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-2"))
    assert losses(again) == losses(trainer)
    rows = trainer.model.get_input_embeddings().weight.shape[0]
    expected = logits_of(trainer.model, rows)
    assert np.array_equal(logits_of(again.model, rows), expected)
    trainer.save_model(str(folder / "adapter"))
    adapter = import_adapter(folder / "adapter", base)
    assert distance(np.array(adapter.loaded.model(mx.array(ids(rows)))), expected) <= CLOSE
    best = import_adapter(trainer.state.best_model_checkpoint, base)
    assert distance(np.array(best.loaded.model(mx.array(ids(rows)))), expected) <= CLOSE
    merge_adapter(adapter, folder / "merged")
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32)
    assert distance(logits_of(merged, rows), expected) <= CLOSE
    assert distance(np.array(load_model(folder / "merged", ModelPlan()).model(mx.array(ids(rows)))), expected) <= CLOSE
    assert len(PreTrainedTokenizerFast.from_pretrained(folder / "merged")) == len(trainer.processing_class)
    assert verify_adapter(folder / "adapter", base).ok
    export_adapter(adapter, folder / "exported", base=str(base))
    assert verify_adapter(folder / "exported").ok
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if rows != ROWS_OF_TABLE:
        theirs.resize_token_embeddings(rows, mean_resizing=False)
    theirs = peft.PeftModel.from_pretrained(theirs, folder / "exported")
    assert distance(logits_of(theirs, rows), expected) <= CLOSE
    return trainer


def check(examples):
    seen = []

    @settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(cases())
    def holds(case):
        with tempfile.TemporaryDirectory() as folder, silence():
            live(case, Path(folder))
        seen.append(case)

    holds()
    assert len(seen) == examples


def test_a_sample_of_drawn_configs_lives_through():
    check(4)


@pytest.mark.wide
def test_drawn_configs_live_through():
    check(60)


ENDS_OF_TIED = {
    "both ends in full": {"modules_to_save": ENDS},
    "LoRA on the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "rows": {"trainable_token_indices": [5, 9, 200]},
}
TIED_TYPES = ("qwen2", "qwen3", "gemma3_text", "granite", "olmo2", "qwen3_moe")
# mlx-lm's code for these has no head but the embedding.
ALWAYS_TIED = ("gemma", "gemma2", "cohere2", "lfm2")


@pytest.mark.parametrize("way", ENDS_OF_TIED)
@pytest.mark.parametrize("model_type", sampled(TIED_TYPES + ALWAYS_TIED, "qwen2", "gemma3_text", "cohere2", "lfm2"))
def test_ends_of_tied_models_cross_from_peft_and_merge(model_type, way, tmp_path):
    base = make_tied(model_type, tmp_path / "base", tie_word_embeddings=True)
    theirs = adapt_torch(load_torch(base), {"r": 4, "target_modules": ["q_proj"], **ENDS_OF_TIED[way]})
    with silence():
        theirs.save_pretrained(tmp_path / "adapter")
    loaded = load_mlx(base)
    adapter = import_adapter(tmp_path / "adapter", loaded)
    expected = logits_torch(theirs)
    assert distance(logits_mlx(loaded.model), expected) <= CLOSE
    with silence():
        merge_adapter(adapter, tmp_path / "merged")
    assert distance(logits_torch(load_torch(tmp_path / "merged")), expected) <= CLOSE
    assert distance(logits_mlx(load_mlx(tmp_path / "merged").model), expected) <= CLOSE


# Every way to train an end that SFTTrainer has (it refuses LoRA on the head), on bases tied and not, resized or not.
KNOWN = {
    "a resized base": Case(False, {"new_num_tokens": 62}, {"target_modules": ["q_proj"]}),
    "a resized tied base": Case(True, {"new_num_tokens": 62}, {"target_modules": ["q_proj"]}),
    "one end of a resized base": Case(False, {"new_num_tokens": 62}, {"target_modules": ["q_proj", "embed_tokens"]}),
    "the embedding of a tied base": Case(True, None, {"target_modules": ["q_proj", "embed_tokens"]}),
    "both ends in full, tied and resized": Case(
        True, {"new_num_tokens": 62}, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    ),
    "the embedding in full, tied and cut": Case(
        True, {"new_num_tokens": 50}, {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"]}
    ),
    "the embedding in full, tied and grown": Case(
        True, {"new_num_tokens": 62}, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    ),
    "the head in full, tied and grown": Case(
        True, {"new_num_tokens": 62}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    ),
    "the embedding of a tied and grown base": Case(
        True, {"new_num_tokens": 62}, {"target_modules": ["q_proj", "embed_tokens"]}
    ),
    "new rows of an embedding": Case(
        False, {"new_num_tokens": 62}, {"target_modules": ["q_proj"], "trainable_token_indices": [60, 61]}
    ),
    "new rows of a tied base": Case(
        True,
        {"new_num_tokens": 62},
        {"target_modules": ["q_proj"], "trainable_token_indices": [60, 61]},
    ),
    "rows of both ends": Case(
        False,
        None,
        {"target_modules": "all-linear", "trainable_token_indices": {"embed_tokens": [6, 8], "lm_head": [1, 8]}},
    ),
}


FEW = (
    "one end of a resized base", "both ends in full, tied and resized", "the embedding in full, tied and cut",
    "new rows of a tied base", "rows of both ends",
)  # fmt: skip


@pytest.mark.parametrize("name", sampled(KNOWN, *FEW))
def test_ends_of_the_vocabulary_train_as_in_trl_and_live_through(name, tmp_path, monkeypatch):
    case = KNOWN[name]
    # trl's loss reads the bias of the head, which PEFT's wrapper of trained rows forgets to have.
    monkeypatch.setattr(peft.utils.other.TrainableTokensWrapper, "bias", None, raising=False)
    with silence():
        ours = live(case, tmp_path)
        base, tokenizer = make_base(tmp_path / "base", case.tied)
        theirs = make_trainer(SFTTrainer, case, base, tokenizer, tmp_path / "theirs")
        theirs.train()
        # An adapter that trl wrote, and its checkpoint, are read like our own.
        rows = theirs.model.get_input_embeddings().weight.shape[0]
        theirs.save_model(str(tmp_path / "theirs" / "adapter"))
        again = make_trainer(MLXSFTTrainer, case, base, tokenizer, tmp_path / "theirs", seed=4)
        if name != "one end of a resized base":
            again.train(resume_from_checkpoint=str(tmp_path / "theirs" / "checkpoint-2"))
            np.testing.assert_allclose(losses(again), losses(theirs), rtol=1e-4)
            adapter = import_adapter(tmp_path / "theirs" / "adapter", base)
            assert distance(np.array(adapter.loaded.model(mx.array(ids(rows)))), logits_of(theirs.model, rows)) <= CLOSE
    np.testing.assert_allclose(losses(ours), losses(theirs), rtol=1e-4)
    kept = {name: value.shape for name, value in ours.model.named_parameters() if value.requires_grad}
    assert kept == {name: value.shape for name, value in theirs.model.named_parameters() if value.requires_grad}
