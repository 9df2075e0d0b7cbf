"""TraceCallback inside TRL's SFTTrainer: what it writes, and the causes it brings to light in real runs."""

from __future__ import annotations

import datasets
import pytest
import torch
import transformers
import trl
from pairs import SILENT, _quiet, run_mlx, run_trl, text_rows, tiny_model

from hf_mlx import MLXSFTTrainer
from hf_mlx.traces.callback import TraceCallback
from hf_mlx.traces.compare import compare_traces
from hf_mlx.traces.trace import read_trace

ROWS = [{"input_ids": [(i * 7 + j) % 120 + 2 for j in range(3 + i * 5 % 17)]} for i in range(20)]


def _tokenizer():
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({f"<{i}>": i for i in range(128)}, unk_token="<0>"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<0>", eos_token="<1>")


def _trace(folder, name, *, model_seed=0, rows=ROWS, **settings):
    """Train 10 steps with TRL on a tiny Llama; returns the path of the trace."""
    settings = {
        "per_device_train_batch_size": 4,
        "max_steps": 10,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "gradient_checkpointing": False,
        "bf16": False,
        **settings,
    }
    torch.manual_seed(model_seed)
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.3,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    args = trl.SFTConfig(
        str(folder / name), use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, **settings
    )
    path = folder / f"{name}.jsonl"
    trl.SFTTrainer(
        transformers.LlamaForCausalLM(config),
        args,
        train_dataset=datasets.Dataset.from_list(rows),
        eval_dataset=datasets.Dataset.from_list(rows[:4]),
        processing_class=_tokenizer(),
        callbacks=[TraceCallback(path)],
    ).train()
    return path


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return _trace(tmp_path_factory.mktemp("reference"), "reference", eval_strategy="steps", eval_steps=3)


def test_every_step_is_written_in_full(reference):
    trace = read_trace(reference)
    assert [step.step for step in trace.steps] == list(range(1, 11))
    assert all(None not in vars(step).values() for step in trace.steps)
    assert len({step.batch for step in trace.steps}) == 10
    lengths = [len(row["input_ids"]) for row in ROWS]
    # 20 rows, 5 steps an epoch: two whole epochs
    assert sum(step.tokens for step in trace.steps) == 2 * sum(lengths)
    assert sum(step.targets for step in trace.steps) == 2 * (sum(lengths) - len(lengths))
    assert trace.header["dtypes"] == ["float32"]


@pytest.mark.parametrize(
    "same",
    [
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "pad_to_multiple_of": 16},
        {"optim": "adamw_torch"},
        {"dataloader_num_workers": 1},
    ],
    ids=lambda same: ",".join(same),
)
def test_settings_that_change_nothing_leave_equal_traces(reference, tmp_path, same):
    comparison = compare_traces(_trace(tmp_path, "other", **same), reference)
    assert comparison, str(comparison)
    assert comparison.steps == 10


@pytest.mark.parametrize(
    ("cause", "changed"),
    [
        ("data order", {"data_seed": 7}),
        ("rows", {"rows": ROWS[::-1][:12]}),
        ("start", {"model_seed": 1}),
        ("schedule", {"lr_scheduler_type": "cosine"}),
        ("schedule", {"learning_rate": 2e-2}),
        ("optimizer", {"adam_beta2": 0.9}),
        ("optimizer", {"weight_decay": 0.0}),
        ("dtype", {"bf16": True}),
    ],
)
def test_a_changed_setting_is_named_as_the_cause(reference, tmp_path, cause, changed):
    comparison = compare_traces(_trace(tmp_path, "other", **changed), reference)
    assert comparison.cause == cause, str(comparison)


def test_a_changed_clip_is_named_as_the_cause(tmp_path):
    # AdamW divides a common factor out again, so that a clip hardly shows; plain SGD does not.
    whole = _trace(tmp_path, "whole", optim="sgd", learning_rate=0.3)
    clipped = _trace(tmp_path, "clipped", optim="sgd", learning_rate=0.3, max_grad_norm=0.05)
    comparison = compare_traces(clipped, whole)
    assert comparison.cause == "clip", str(comparison)


@pytest.fixture(scope="module")
def both_sides(tmp_path_factory):
    """The same LoRA script traced in TRL and here."""
    folder = tmp_path_factory.mktemp("sides")
    model = tiny_model("llama", folder / "model")
    settings = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "eval_strategy": "epoch",
    }
    lora = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    rows = text_rows(20)
    for run, name in ((run_trl, "trl"), (run_mlx, "mlx")):
        run(
            model,
            settings,
            rows,
            lora,
            callbacks=[TraceCallback(folder / f"{name}.jsonl")],
            eval_dataset=datasets.Dataset.from_list(rows[:4]),
        )
    return folder / "trl.jsonl", folder / "mlx.jsonl"


class OwnOrder:
    """A loader of the script's own."""

    def get_train_dataloader(self):
        rows = self.train_dataset.select_columns(["input_ids", "labels"])
        return torch.utils.data.DataLoader(rows, batch_size=3, collate_fn=self.data_collator)


@pytest.mark.parametrize("as_object", [False, True])
def test_a_loader_of_the_scripts_own_is_traced(as_object, tmp_path):
    model = tiny_model("llama", tmp_path / "model")
    for name, house in (("trl", trl.SFTTrainer), ("mlx", MLXSFTTrainer)):
        with _quiet():
            args = trl.SFTConfig(str(tmp_path / name), max_steps=4, logging_steps=1, **SILENT)
            type("Own", (OwnOrder, house), {})(
                transformers.AutoModelForCausalLM.from_pretrained(model) if as_object else str(model),
                args,
                train_dataset=datasets.Dataset.from_list(text_rows(11)),
                callbacks=[TraceCallback(tmp_path / f"{name}.jsonl")],
            ).train()
    theirs, ours = (read_trace(tmp_path / f"{name}.jsonl") for name in ("trl", "mlx"))
    assert all(step.batch for step in ours.steps)
    comparison = compare_traces(ours, theirs)
    assert comparison, str(comparison)
    assert comparison.steps == 4


def test_the_same_script_leaves_the_same_trace_on_both_sides(both_sides):
    theirs, ours = (read_trace(path) for path in both_sides)
    comparison = compare_traces(ours, theirs)
    assert comparison, str(comparison)
    assert comparison.steps == 8  # 10 micro-batches, 4 updates an epoch, the last of one micro-batch
    assert all(None not in vars(step).values() for step in ours.steps)
    assert ours.header["start_norm"] == pytest.approx(theirs.header["start_norm"], rel=1e-6)
