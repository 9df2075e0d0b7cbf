"""The report of a run: it says what the run logged, changes no number, and is only where it was asked to be."""

import json
import re
from html import unescape
from pathlib import Path

import pytest
from datasets import Dataset
from forked_scripts import HF_MLX_RUN, run_forked
from pairs import SILENT, tiny_model
from peft import LoraConfig
from transformers import TrainerCallback
from trl import DPOConfig, SFTConfig

from hf_mlx import MLXDPOTrainer, MLXSFTTrainer

ROWS = [{"prompt": f"add {n} & <{n}>", "completion": f" is {2 * n}"} for n in range(16)]
SETTINGS = {
    **SILENT, "max_steps": 4, "logging_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-3,
    "eval_strategy": "steps", "eval_steps": 2, "neftune_noise_alpha": 5.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("model") / "llama")


def sft(model, folder, *, callbacks=None, **changes):
    return MLXSFTTrainer(
        str(model), SFTConfig(output_dir=str(folder), **{**SETTINGS, **changes}), callbacks=callbacks,
        train_dataset=Dataset.from_list(ROWS), eval_dataset=Dataset.from_list(ROWS[:4]),
        peft_config=LoraConfig(r=2, target_modules="all-linear"),
    )  # fmt: skip


def text_of(page: str) -> str:
    return unescape(re.sub(r"<[^>]+>", " ", page))


def test_it_says_what_the_run_logged(model, tmp_path):
    trainer = sft(model, tmp_path)
    trainer.train()
    page = (tmp_path / "report.html").read_text()
    text = text_of(page)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 4
    for entry in logged:
        assert f"loss {entry['loss']:.4g} at step {entry['step']}" in text
    for name in ("eval_loss", "learning_rate", "grad_norm", "tokens/s", "memory (GiB)", "mean_token_accuracy"):
        assert f"● {name}" in text or f"{name} by step" in text, name
    for line in trainer.ledger.notices():
        field, reason = line.split("=")[0], line.split(": ", 1)[1]
        assert field in text and reason in text
    assert "neftune_noise_alpha" in text and "4 of 4" in text
    assert "add 0 & <0>" in page.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    assert re.search(r"<mark>[^<]* is 0", page)
    assert not re.search(r"<(script|link|img|iframe)|src=|href=", page)


@pytest.mark.parametrize("asked", ["0", "file"])
def test_the_numbers_are_the_same_and_it_goes_where_it_is_asked(model, tmp_path, monkeypatch, asked):
    first = sft(model, tmp_path / "with")
    first.train()
    target = tmp_path / "elsewhere" / "run.html"
    monkeypatch.setenv("HF_MLX_REPORT", str(target) if asked == "file" else asked)
    second = sft(model, tmp_path / "without")
    second.train()
    told = [[entry for entry in one.state.log_history if "loss" in entry] for one in (first, second)]
    assert told[0] == told[1] and len(told[0]) == 4
    assert (tmp_path / "with" / "report.html").exists()
    assert not (tmp_path / "without" / "report.html").exists()
    assert target.exists() == (asked == "file")


class Fails(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise RuntimeError("the <script>'s own error")


def test_a_run_that_stops_early_says_why(model, tmp_path):
    with pytest.raises(RuntimeError, match="own error"):
        sft(model, tmp_path, callbacks=[Fails()]).train()
    text = text_of((tmp_path / "report.html").read_text())
    assert "stopped early: RuntimeError: the <script>'s own error" in text and "at step 2" in text


def test_what_cannot_be_written_is_one_line_and_stops_nothing(model, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("HF_MLX_REPORT", str(tmp_path / "file" / "report.html"))
    trainer = sft(model, tmp_path / "out")
    assert trainer.train().global_step == 4
    assert [line for line in caplog.messages if "was not written" in line and "HF_MLX_REPORT=0" in line]


def test_pairs_show_both_answers(model, tmp_path):
    rows = [{"prompt": f"add {n}", "chosen": f" is {2 * n}", "rejected": " no idea"} for n in range(8)]
    settings = {**SILENT, "max_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 2}
    MLXDPOTrainer(
        str(model), args=DPOConfig(output_dir=str(tmp_path), **settings), train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(r=2, target_modules="all-linear"),
    ).train()  # fmt: skip
    text = text_of((tmp_path / "report.html").read_text())
    assert "row 0, chosen" in text and "row 0, rejected" in text and "no idea" in text
    assert "rewards/margins by step" in text


SCRIPT = """
import sys
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer
args = SFTConfig(output_dir="out", use_cpu=True, bf16=False, max_steps=2, logging_steps=1, report_to="none")
rows = Dataset.from_list([{"text": "one two three"}, {"text": "four five six"}] * 4)
SFTTrainer(sys.argv[1], args, train_dataset=rows, peft_config=LoraConfig(r=2)).train()
"""


@pytest.mark.parametrize("flags", [[], ["--report", "run.html"]], ids=["plain", "asked"])
def test_a_script_that_is_run_leaves_upstreams_files(model, tmp_path, flags, monkeypatch):
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    run_forked([*HF_MLX_RUN, *flags, "script.py", model], environ={"HF_MLX_REPORT": None})
    assert sorted(one.name for one in (tmp_path / "out").iterdir()) == ["README.md", "checkpoint-2"]
    assert (tmp_path / "run.html").exists() == bool(flags)
    assert json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())["global_step"] == 2
