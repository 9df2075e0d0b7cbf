"""Whole scripts, unedited: under ``hf-mlx run`` they give the losses and the output of plain TRL."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import trl
from dropin_models import losses, write_model, write_rows
from forked_scripts import HF_MLX_RUN, run_forked
from peft import PeftModel
from transformers import AutoModelForCausalLM

SCRIPTS = Path(__file__).parent / "scripts"
TRL_SFT = Path(trl.__file__).parent / "scripts" / "sft.py"
HF_MLX = [sys.executable, "-m", "hf_mlx.cli.main"]
# The promise of a drop-in; measured differences are below 1e-6.
LOSS = 1e-4

_SHARED = [
    *("--max_steps", "6", "--bf16", "False", "--use_cpu", "--report_to", "none", "--logging_steps", "1"),
    *("--eval_strategy", "steps", "--eval_steps", "3", "--learning_rate", "1e-3"),
    *("--per_device_train_batch_size", "2", "--gradient_checkpointing", "False"),
]
# Numbers that a clock makes, and where the output went.
_TIMES = re.compile(r"(_runtime|_per_second)\s*=.*|'(train|eval)_(runtime|\w+_per_second)': '[^']*'|out-(trl|mlx)")


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A model folder, a file of rows, and a dataset folder with two splits."""
    root = tmp_path_factory.mktemp("dropin")
    write_model(root / "model")
    write_rows(root / "rows.jsonl")
    write_rows(root / "dataset" / "train.jsonl")
    write_rows(root / "dataset" / "test.jsonl", 6)
    return root


def _run(words: list, *, status: int = 0) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == status, done.stderr[-3000:]
    return done


def _losses(folder: Path) -> list[float]:
    return losses(json.loads((folder / "trainer_state.json").read_text())["log_history"])


def _text(output: str) -> str:
    # Log lines are tqdm's and appear among the rest; their numbers are compared through trainer_state.json.
    lines = [line for line in output.splitlines() if not line.startswith("{'")]
    # Columns of metrics are as wide as the longest time.
    return "\n".join(re.sub(r"= +", "= ", _TIMES.sub("", line)) for line in lines)


STYLES = ("peft_object", "peft_config", "plain_arguments", "merge_and_save")


@pytest.mark.parametrize("style", STYLES)
def test_a_script_gives_trls_losses_and_output(style, material):
    words = [SCRIPTS / f"{style}.py", material / "model", material / "rows.jsonl"]
    theirs, ours = material / style / "out-trl", material / style / "out-mlx"
    plain = run_forked([*words, theirs])
    # One from the shell, where nothing is imported before it; the others with their libraries imported.
    run = _run([*HF_MLX, "run", *words, ours]) if style == STYLES[0] else run_forked([*HF_MLX_RUN, *words, ours])
    assert len(_losses(ours)) >= 6
    assert _losses(ours) == pytest.approx(_losses(theirs), rel=LOSS)
    assert _text(run.stdout) == _text(plain.stdout)
    assert {path.name for path in theirs.rglob("*")} == {path.name for path in ours.rglob("*")}
    assert "HONOUR" in run.stderr  # the ledger, once
    assert run.stderr.count("per_device_train_batch_size") == 1


def test_a_model_by_name_and_parsed_arguments(material):
    words = [SCRIPTS / "model_name.py", "--model_name", material / "model", "--data", material / "rows.jsonl", *_SHARED]
    words += ["--save_strategy", "no", "--output_dir"]
    theirs, ours = material / "name" / "out-trl", material / "name" / "out-mlx"
    plain, run = run_forked([*words, theirs]), run_forked([*HF_MLX_RUN, *words, ours])
    assert len(_losses(ours)) == 6
    assert _losses(ours) == pytest.approx(_losses(theirs), rel=LOSS)
    assert _text(run.stdout) == _text(plain.stdout)
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(material / "model"), ours)


def test_keywords_of_older_libraries_mean_what_they_meant(material):
    words = [SCRIPTS / "older_keywords.py", material / "model", material / "rows.jsonl"]
    theirs, ours = material / "older" / "out-trl", material / "older" / "out-mlx"
    run_forked([*words, theirs, "today"])
    run = run_forked([*HF_MLX_RUN, *words, ours, "older"])
    assert len(_losses(ours)) == 6
    assert _losses(ours) == pytest.approx(_losses(theirs), rel=LOSS)
    assert "warmup_ratio=0.5 is now warmup_steps=0.5" in run.stderr
    assert "evaluation_strategy is now eval_strategy" in run.stderr


def test_trls_own_sft_script(material):
    flags = ["--model_name_or_path", material / "model", "--dataset_name", material / "dataset", *_SHARED]
    flags += [
        "--use_peft",
        "--lora_r",
        "4",
        "--lora_dropout",
        "0",
        "--save_strategy",
        "steps",
        "--save_steps",
        "6",
        "--output_dir",
    ]
    theirs, ours, third = (material / "sft" / name for name in ("out-trl", "out-mlx", "out-command"))
    plain, run = run_forked([TRL_SFT, *flags, theirs]), run_forked([*HF_MLX_RUN, TRL_SFT, *flags, ours])
    command = run_forked(["-m", "hf_mlx.cli.main", "sft", *flags, third])
    expected = _losses(theirs / "checkpoint-6")
    assert len(expected) == 6
    for folder in (ours, third):
        assert _losses(folder / "checkpoint-6") == pytest.approx(expected, rel=LOSS)
    assert _text(run.stdout) == _text(plain.stdout)
    assert "Training completed" in command.stdout


def test_a_dry_run_says_everything_and_trains_nothing(material):
    ours = material / "dry" / "out-mlx"
    words = [SCRIPTS / "peft_object.py", material / "model", material / "rows.jsonl", ours]
    run = run_forked([*HF_MLX_RUN, "--dry-run", *words])
    assert "steps: 8" in run.stdout
    # The script prints PEFT's own count first.
    assert run.stdout.count("trainable params: 7,168 || all params: 130,368 || trainable%: 5.4983") == 2
    assert "peak memory, estimated" in run.stdout
    assert "LoraPlan(r=8" in run.stdout
    assert "HONOUR" in run.stderr
    assert not (ours / "trainer_state.json").exists()
    assert "generated" not in run.stdout


CUDA_SCRIPT = """
import sys, torch
from peft import LoraConfig, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer
from datasets import load_dataset

def annotated(x: int): ...

assert sys.argv[1:] == ["--flag", "x"] and __name__ == "__main__"
assert annotated.__annotations__ == {{"x": int}} and annotated.__module__ == "__main__"
model = AutoModelForCausalLM.from_pretrained(
    {model!r},
    quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    device_map={{"": 0}},
    attn_implementation="flash_attention_2",
)
model = prepare_model_for_kbit_training(model)
trainer = SFTTrainer(
    model,
    args=SFTConfig({output!r}, max_steps=2, use_cpu=True, bf16=False, report_to="none", optim="paged_adamw_8bit"),
    train_dataset=load_dataset("json", data_files={rows!r}, split="train"),
    peft_config=LoraConfig(target_modules=["q_proj"]),
)
trainer.train()
print("bits:", trainer.plan.model.quantization_bits)
sys.exit(3)
"""


def test_what_only_cuda_has_is_mapped_and_said(material, tmp_path):
    script = tmp_path / "cuda.py"
    script.write_text(
        CUDA_SCRIPT.format(
            model=str(material / "model"), output=str(tmp_path / "out"), rows=str(material / "rows.jsonl")
        )
    )
    run = run_forked([*HF_MLX_RUN, script, "--flag", "x"], status=3)
    assert "bits: 4" in run.stdout
    for said in ("4-bit loading", "device_map=", "attn_implementation='flash_attention_2'", "paged_adamw_8bit"):
        assert said in run.stderr
    strict = run_forked([*HF_MLX_RUN, "--strict", script, "--flag", "x"], status=1)
    assert "SettingError" in strict.stderr
    assert "optim=adamw_torch" in strict.stderr or 'optim="adamw_torch"' in strict.stderr


def test_an_error_is_the_scripts_own(tmp_path):
    script = tmp_path / "broken.py"
    script.write_text("def inner():\n    return 1 / 0\n\n\ninner()\n")
    plain, run = _run([sys.executable, script], status=1), _run([*HF_MLX, "run", script], status=1)
    assert run.stderr.splitlines()[-7:] == plain.stderr.splitlines()[-7:]
    assert "hf_mlx" not in run.stderr
    missing = _run([*HF_MLX, "run", tmp_path / "nothing.py"], status=2)
    assert "a Python file" in missing.stderr
