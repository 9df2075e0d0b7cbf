"""From launch to the first step: what is read when, and where the time went."""

from __future__ import annotations

import gc
import logging
import time
from pathlib import Path

import mlx.core as mx
import pytest
from dropin_models import ROWS, make_model, make_tokenizer, write_model
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from trl import SFTConfig

from hf_mlx import MLXSFTTrainer
from hf_mlx.errors import DataError, ModelError

LORA = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")


def arguments(folder: Path, **changes) -> SFTConfig:
    options = {"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "save_strategy": "no"}
    options |= {"report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True}
    return SFTConfig(str(folder), **(options | changes))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("base") / "model")


class Slow(TrainerCallback):
    """Takes half a second where nothing is to be counted twice."""

    def on_train_begin(self, args, state, control, **kwargs):
        time.sleep(0.5)

    def on_step_end(self, args, state, control, **kwargs):
        time.sleep(0.5)


def test_the_breakdown_adds_up_and_is_said_once(base, tmp_path, caplog):
    caplog.set_level(logging.INFO, "hf_mlx")
    began = time.perf_counter()
    trainer = MLXSFTTrainer(str(base), arguments(tmp_path), train_dataset=ROWS, peft_config=LORA, callbacks=[Slow])
    constructed = time.perf_counter() - began
    held = list(trainer.callback_handler.callbacks)
    early = trainer.startup
    assert early.first_step is None and early.total == pytest.approx(constructed, abs=0.1)
    time.sleep(0.5)  # the script's own
    trainer.train()
    done = trainer.startup
    assert 0.5 <= done.opening < 1.0
    assert done.first_step is not None and done.first_step > 0
    assert done.total == pytest.approx(early.total + done.opening + done.first_step)
    assert done.script is not None and done.script > 0
    said = [record.message for record in caplog.records if record.message.startswith("Started in")]
    assert said == [done.describe()]
    assert f"data {done.data:.1f} s" in said[0] and f"first step {done.first_step:.1f} s" in said[0]
    trainer.train()
    assert trainer.startup == done
    assert trainer.callback_handler.callbacks == held
    assert not any("start" in key for entry in trainer.state.log_history for key in entry)


def test_a_run_that_fails_before_its_first_step_is_measured_by_the_next(base, tmp_path):
    class Refuse(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            raise RuntimeError("not yet")

    trainer = MLXSFTTrainer(str(base), arguments(tmp_path), train_dataset=ROWS, peft_config=LORA, callbacks=[Refuse])
    with pytest.raises(RuntimeError, match="not yet"):
        trainer.train()
    assert trainer.startup.first_step is None
    trainer.remove_callback(Refuse)
    trainer.train()
    assert trainer.startup.first_step is not None


def wide_model(folder: Path) -> Path:
    """16 MiB of fp32, so that weights stand out from everything else."""
    config = LlamaConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4, vocab_size=384
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def settle_memory() -> int:
    """Bytes that MLX holds once earlier tests' trainers are gone; the peak counts from here."""
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    return mx.get_active_memory()


def test_a_bad_row_is_named_before_weights_are_read(tmp_path):
    base = wide_model(tmp_path / "base")
    before = settle_memory()
    with pytest.raises(DataError, match="row 1"):
        MLXSFTTrainer(str(base), arguments(tmp_path), train_dataset=[{"text": "a b c"}, {"text": None}])
    assert mx.get_peak_memory() - before < 1 << 20


def test_a_model_that_cannot_be_trained_is_named_before_a_row_is_read(base, tmp_path):
    read = []

    def text(row):
        read.append(row)
        return row["prompt"]

    folder = write_model(tmp_path / "base")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        MLXSFTTrainer(str(folder), arguments(tmp_path), train_dataset=ROWS, formatting_func=text)
    assert not read


def test_a_bad_row_leaves_a_loaded_model_as_it_was(tmp_path):
    model = make_model()
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(DataError, match="row 1"):
        MLXSFTTrainer(
            model,
            arguments(tmp_path),
            train_dataset=[{"text": "a b c"}, {"text": None}],
            processing_class=make_tokenizer(),
            peft_config=LORA,
        )
    assert [name for name, _ in model.named_parameters()] == names


# Above what is kept: one module in the dtype it is stored in, an eighth of this model.
ROOM = 1 << 21


@pytest.mark.parametrize(
    ("changes", "options"), [({"bf16": True}, {}), ({}, {"quantization_config": {"load_in_4bit": True}})]
)
def test_loading_takes_no_more_memory_than_what_is_kept(tmp_path, changes, options):
    base = wide_model(tmp_path / "base")
    before = settle_memory()
    trainer = MLXSFTTrainer(str(base), arguments(tmp_path, **changes), train_dataset=ROWS, peft_config=LORA, **options)
    kept = mx.get_active_memory() - before
    assert mx.get_peak_memory() - before < kept + ROOM
    assert kept < 12 << 20, "the weights are kept in fewer bits than they are stored in"
    assert trainer.session.adapter is not None
