"""SIGKILL at any moment: the resumed run ends with the adapter, and the log, of the run that was never killed."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
from checkpoint_runs import final_bytes, start, timeless
from pairs import tiny_model
from sampling import sampled

# A run takes a little more than a second, half of it before the first step, and does 900 file operations.
SECONDS = 1.0
OPERATIONS = 250
# Three kills within 200 operations each cannot outlast a run of 900, however fast the machine is.
SURE_KILLS, SURE_OPERATIONS = 3, 200


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    process = start(model, folder)
    process.join()
    assert process.exitcode == 0
    return folder


def history(folder: Path) -> list[dict]:
    return timeless(json.loads((folder / "trainer_state.json").read_text())["log_history"])


def assert_same_end(folder: Path, whole: Path) -> None:
    assert final_bytes(folder) == final_bytes(whole)
    assert history(folder) == history(whole)


def kill_repeatedly(
    model: Path,
    folder: Path,
    draw: random.Random,
    kills: int,
    *,
    operations: int = OPERATIONS,
    timed: float = 0.5,
    **settings: Any,
) -> int:
    """Start, kill at a random time or file operation, resume; at last let it end. Returns how many were killed."""
    killed = 0
    for turn in range(kills):
        by_operation = turn == 0 or draw.random() >= timed
        process = start(model, folder, draw.randrange(1, operations) if by_operation else None, **settings)
        if not by_operation:
            time.sleep(draw.uniform(0.2, SECONDS))
            process.kill()
        process.join()
        assert process.exitcode in (0, -9)
        killed += process.exitcode == -9
    process = start(model, folder, **settings)
    process.join()
    assert process.exitcode == 0
    return killed


@pytest.mark.parametrize("seed", sampled([1, 2], 1))
def test_a_killed_run_ends_as_if_it_had_not_been(model, whole, tmp_path, seed):
    killed = kill_repeatedly(model, tmp_path, random.Random(seed), SURE_KILLS, operations=SURE_OPERATIONS, timed=0.0)
    assert killed == SURE_KILLS
    assert_same_end(tmp_path, whole)


@pytest.mark.wide
@pytest.mark.parametrize(
    "settings",
    [{"lora": True}, {"lora": False, "sync_ref_model": True, "ref_model_sync_steps": 3}],
    ids=["LoRA", "full"],
)
def test_a_killed_run_of_preferences_ends_as_if_it_had_not_been(model, tmp_path, settings):
    settings = {**settings, "preferences": True}
    process = start(model, tmp_path / "whole", **settings)
    process.join()
    assert process.exitcode == 0
    sure = {"operations": SURE_OPERATIONS, "timed": 0.0}
    assert kill_repeatedly(model, tmp_path / "killed", random.Random(3), SURE_KILLS, **sure, **settings) == SURE_KILLS
    assert_same_end(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.wide
def test_fifty_random_kills(model, whole, tmp_path):
    killed = 0
    for seed in range(100, 125):
        folder = tmp_path / str(seed)
        killed += kill_repeatedly(model, folder, random.Random(seed), 4)
        assert_same_end(folder, whole)
        if killed >= 50:
            break
    assert killed >= 50
