"""Pushing, against a stand-in of the hub on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from dropin_models import write_model, write_rows
from hub_server import serve
from huggingface_hub import ModelCard
from safetensors.numpy import load

SCRIPT = Path(__file__).parent / "scripts" / "push.py"


def test_checkpoints_the_end_and_the_model_are_pushed(tmp_path):
    words = [SCRIPT, write_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl"), tmp_path / "out"]
    with serve() as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
        environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        run = subprocess.run(
            [sys.executable, "-m", "hf_mlx.cli.main", "run", *map(str, words)],
            capture_output=True, text=True, env=environment, timeout=300,
        )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert f"id: me/tiny-sft commit: {4 + 1:040d}" in run.stdout
    assert [created["name"] for created in hub.created] == ["tiny-sft", "alone"]
    pushed = [(repository, message) for repository, message, _ in hub.commits]
    step = "Training in progress, step"
    assert sorted(pushed[:4]) == sorted(
        ("me/tiny-sft", f"{step} {n}{suffix}") for n in (2, 4) for suffix in ("", ", checkpoint")
    )
    assert pushed[4:] == [("me/tiny-sft", "End of training"), ("me/alone", "Upload model")]
    by_message = {message: files for _, message, files in hub.commits}
    assert "last-checkpoint/optimizer.pt" in by_message[f"{step} 4, checkpoint"]
    end = by_message["End of training"]
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"} <= end.keys()
    assert not any(path.startswith(("checkpoint-", "optimizer", "hf_mlx")) for path in end)
    assert any(key.endswith("q_proj.lora_B.weight") for key in load(end["adapter_model.safetensors"]))
    card = ModelCard(end["README.md"].decode())
    assert card.data.library_name == "peft"
    assert card.data.datasets == "me/rows"
    assert {"tiny", "sft", "generated_from_trainer"} <= set(card.data.tags)
    assert b"hf_secret" not in b"".join(content for files in by_message.values() for content in files.values())
    assert "Bearer hf_secret" in hub.tokens
