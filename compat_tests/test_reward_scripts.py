"""Whole reward-model scripts, unedited: the page's example and trl's own, under ``hf-mlx``, beside plain TRL."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trl
from forked_scripts import HF_MLX_RUN, run_forked
from pairs import tiny_model
from peft import PeftModelForSequenceClassification
from reward_pairs import reward_rows
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reward.md"
TRL_REWARD = Path(trl.__file__).parent / "scripts" / "reward.py"
HF_MLX = [sys.executable, "-m", "hf_mlx.cli.main"]
LOSS = 1e-4


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("reward")
    tiny_model("llama", root / "model")
    for name, count in (("train", 12), ("test", 4)):
        (root / "dataset").mkdir(exist_ok=True)
        lines = [json.dumps(row) for row in reward_rows("implicit chat", count)]
        (root / "dataset" / f"{name}.jsonl").write_text("\n".join(lines))
    return root


def run(words: list, folder: Path, *, status: int = 0) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    folder.mkdir(exist_ok=True)
    words = list(map(str, words))
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=folder, timeout=300)
    assert done.returncode == status, done.stderr[-3000:]
    return done


def losses(folder: Path) -> list[float]:
    (state,) = folder.rglob("checkpoint-3/trainer_state.json")
    return [entry["loss"] for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]


@pytest.mark.filterwarnings("ignore")
def test_the_pages_example(material, monkeypatch):
    """What the page tells people to type, with a model and rows of this machine, by TRL and under ``hf-mlx run``."""
    script, load = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    for old, new in {
        '"Qwen/Qwen2.5-0.5B-Instruct"': repr(str(material / "model")),
        'load_dataset("trl-lib/ultrafeedback_binarized", split="train")': repr_rows(material),
        "from hf_mlx import MLXRewardTrainer\n": "",
        "MLXRewardTrainer(": "RewardTrainer(",
        "from trl import RewardConfig": "from trl import RewardConfig, RewardTrainer",
        "max_length=512,": 'max_length=512, max_steps=3, logging_steps=1, use_cpu=True, bf16=False, report_to="none",',
    }.items():
        assert script.count(old) == 1
        script = script.replace(old, new)
    (material / "page.py").write_text(script)
    theirs, ours = material / "theirs", material / "ours"
    theirs.mkdir()
    monkeypatch.chdir(theirs)
    exec(compile(script, "page.py", "exec"), {})
    ours.mkdir()
    done = run_forked([*HF_MLX_RUN, material / "page.py"], cwd=ours)
    assert len(losses(theirs)) == 3 and losses(ours) == pytest.approx(losses(theirs), rel=LOSS)
    assert "HONOUR" in done.stderr and "on torch" not in done.stderr
    assert {p.name for p in theirs.rglob("*")} == {p.name for p in ours.rglob("*")} - {
        "hf_mlx_manifest.json", "hf_mlx_state.json"
    }  # fmt: skip
    rewards = []
    for folder in (theirs, ours):
        found: dict = {}
        exec(load.replace('"reward/adapter"', repr(str(folder / "reward" / "adapter"))), found)
        assert isinstance(found["model"], PeftModelForSequenceClassification)
        with torch.no_grad():
            rewards.append(found["model"](torch.tensor([[5, 9, 30, 71]])).logits)
    torch.testing.assert_close(rewards[1], rewards[0], atol=1e-4, rtol=1e-4)


def repr_rows(material: Path) -> str:
    return f'load_dataset("json", data_files={str(material / "dataset" / "train.jsonl")!r}, split="train")'


@pytest.mark.wide
def test_trls_own_script(material):
    flags = ["--model_name_or_path", material / "model", "--dataset_name", material / "dataset", "--max_steps", "3"]
    flags += ["--bf16", "False", "--use_cpu", "--report_to", "none", "--logging_steps", "1", "--eval_strategy", "steps"]
    flags += ["--use_peft", "--lora_task_type", "SEQ_CLS", "--output_dir", "out"]
    theirs, ours = material / "trl", material / "command"
    run([sys.executable, TRL_REWARD, *flags], theirs)
    command = run([*HF_MLX, "reward", *flags], ours)
    assert len(losses(theirs)) == 3 and losses(ours) == pytest.approx(losses(theirs), rel=LOSS)
    assert "Training completed" in command.stdout


ENCODER = """
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer

trainer = RewardTrainer(
    AutoModelForSequenceClassification.from_pretrained("bert", num_labels=1),
    RewardConfig("out", max_steps=1, use_cpu=True, bf16=False, report_to="none", save_strategy="no"),
    train_dataset=Dataset.from_list([{"chosen_ids": [1, 2, 3], "rejected_ids": [2]}] * 8),
    processing_class=AutoTokenizer.from_pretrained("bert"),
)
trainer.train()
"""


@pytest.mark.wide
def test_an_encoder_goes_to_torch_with_one_line(material):
    folder = material / "encoder"
    (folder / "bert").mkdir(parents=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"))
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(folder / "bert")
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForSequenceClassification(BertConfig(vocab_size=6, num_labels=1, **size)).save_pretrained(folder / "bert")
    (folder / "train.py").write_text(ENCODER)
    done = run([*HF_MLX, "run", folder / "train.py"], folder)
    assert "hf-mlx run: trl.RewardTrainer is not trained by MLX in this version; it runs on torch" in done.stderr
    strict = run([*HF_MLX, "run", "--strict", folder / "train.py"], folder, status=1)
    assert "trl.RewardTrainer under hf-mlx run --strict" in strict.stderr
