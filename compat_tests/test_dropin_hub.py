"""A stand-in of the hub on this machine: what it is asked for, and what is pushed to it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dropin_models import make_model, write_model, write_rows
from forked_scripts import HF_MLX_RUN, forking
from hub_server import COMMIT, Hub, serve
from huggingface_hub import ModelCard
from safetensors.numpy import load

SCRIPTS = Path(__file__).parent / "scripts"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


@pytest.fixture(scope="module")
def hub(base, tmp_path_factory):
    """Gives out a model, and one whose weights are there twice."""
    both = write_model(tmp_path_factory.mktemp("both") / "model")
    torch.save(make_model().state_dict(), both / "pytorch_model.bin")
    with serve({"me/tiny": base, "me/both": both}) as hub:
        yield hub


@pytest.fixture(scope="module")
def run(hub, tmp_path_factory):
    """Runs a script whose hub is the stand-in; what was downloaded stays for the next."""
    environment = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment |= {"HF_HOME": str(tmp_path_factory.mktemp("home")), "HF_HUB_DISABLE_XET": "1"}
    with forking({**environment, "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1"}) as run:
        yield run


def ask(hub: Hub, run, *words: object) -> list[str]:
    """What the trainer asked the hub for, from its constructor on."""
    hub.asked.clear()
    run([*HF_MLX_RUN, SCRIPTS / "hub_model.py", *words])
    return hub.asked[hub.asked.index("constructor") + 1 :]


def test_a_hub_id_is_looked_up_once(hub, run, rows, tmp_path):
    lookup = ["api/models/me/tiny/revision/main"]
    first, again = (ask(hub, run, "me/tiny", rows, tmp_path / "out") for _ in range(2))
    assert [path for path in first if path.startswith("api/")] == [*lookup, f"api/models/me/tiny/tree/{COMMIT}"]
    assert sum(path.endswith("/model.safetensors") for path in first) <= 2  # one HEAD, one GET
    assert again == lookup


def test_a_loaded_model_costs_one_look_up_and_no_second_copy_of_its_weights(hub, run, rows, tmp_path):
    asked = ask(hub, run, "me/both", rows, tmp_path / "out", "loaded")
    assert sum(path.startswith("api/") and "/revision/" in path for path in asked) == 1
    assert not any(path.endswith(".safetensors") for path in asked)


def test_checkpoints_the_end_and_the_model_are_pushed(base, rows, hub, run, tmp_path):
    done = run([*HF_MLX_RUN, SCRIPTS / "push.py", base, rows, tmp_path / "out"])
    assert f"id: me/tiny-sft commit: {4 + 1:040d}" in done.stdout
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
