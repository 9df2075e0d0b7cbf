"""The benchmarks run as they stand: every peer trains, and figures, versions and chart are kept."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

# Each peer is a process that imports its libraries: half a minute of CPU for each benchmark.
pytestmark = pytest.mark.wide

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def test_a_step_beside_the_peers(tmp_path):
    kept, chart = tmp_path / "out" / "step.json", tmp_path / "out" / "step.png"
    words = ["--preset", "tiny", "--shapes", "1x16", "--steps", "9", "--warm-up", "1", "--rounds", "1"]
    words += ["--json", kept, "--chart", chart]
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "sft_step.py", *map(str, words)], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]

    report = json.loads(kept.read_text())
    found = {result["peer"]: result for result in report["results"]}
    assert list(found) == ["hf_mlx", "mlx-lm", "mlx-lm +1", "trl"]
    assert all(result["seconds"] > 0 and result["peak"] > 0 and result["tokens"] == 16 for result in found.values())
    # One round of the bare step and of the trainer.
    assert len(found["hf_mlx"]["alone"]) == len(found["hf_mlx"]["whole"]) == 9
    # The same script, rows and model have the same loss, logged once in ten steps.
    assert len(found["trl"]["losses"]) == 1
    assert found["hf_mlx"]["losses"] == pytest.approx(found["trl"]["losses"], rel=1e-4)
    assert report["versions"]["mlx"] and report["versions"]["device"]
    rows = [line.split() for line in done.stdout.splitlines() if line.strip().startswith("1x16")]
    assert [row[2] for row in rows] == ["hf_mlx", "mlx-lm", "mlx-lm", "trl"]
    assert chart.stat().st_size > 10_000


def test_parts_of_the_scripts_own(tmp_path):
    kept = tmp_path / "own.json"
    words = ["--shape", "1x16", "--steps", "2", "--warm-up", "1", "--rounds", "1", "--trained", "adapter"]
    words += ["--json", kept]
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "own_parts.py", *map(str, words)], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(kept.read_text())
    assert [result["variant"] for result in report["results"]] == ["compiled", "optimizer", "loss"]
    assert all(result["seconds"] > 0 and result["numbers"] > 0 for result in report["results"])
    assert report["results"][0]["ratio"] == 1


def test_a_step_of_pre_training_beside_transformers(tmp_path):
    kept = tmp_path / "out" / "trainer.json"
    words = ["--shapes", "1x16", "--steps", "3", "--warm-up", "1", "--json", kept]
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "trainer_step.py", *map(str, words)], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(kept.read_text())["results"]
    assert [result["peer"] for result in results] == ["hf_mlx", "transformers"]
    assert all(result["seconds"] > 0 and result["peak"] > 0 and result["tokens"] == 16 for result in results)
    assert results[0]["losses"] == pytest.approx(results[1]["losses"], rel=1e-4)
    assert len(results[0]["losses"]) == 1


def test_a_step_of_preferences_beside_trl(tmp_path):
    kept = tmp_path / "out" / "dpo.json"
    words = ["--shapes", "1x16", "--prompts", "0.5", "--steps", "3", "--warm-up", "1", "--json", kept]
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "dpo_step.py", *map(str, words)], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(kept.read_text())
    ours, theirs = report["results"]
    assert (ours["peer"], theirs["peer"], report["reference"]) == ("hf_mlx", "trl", "base")
    assert all(each["seconds"] > 0 and each["peak"] > 0 and each["pairs"] == 1 for each in (ours, theirs))
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)
    # One line a peer, with pairs per second and the reference's form over them.
    lines = [line.split() for line in done.stdout.splitlines() if line.strip().startswith("1x16")]
    assert [line[3] for line in lines] == ["hf_mlx", "trl"]
    assert "reference: the policy with its adapter off" in done.stdout


def test_one_process_and_two_beside_torchrun(tmp_path):
    kept = tmp_path / "ranks.json"
    words = ["--preset", "tiny", "--shape", "2x32", "--check-shape", "2x16", "--check-steps", "2", "--steps", "3"]
    words += ["--warm-up", "1", "--dtype", "float32", "--limit", "800", "--json", kept]
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "ranks.py", *map(str, words)], capture_output=True, text=True, timeout=850
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    report = json.loads(kept.read_text())
    found = {(one["peer"], one["processes"], one["part"]): one["ranks"] for one in report["results"]}
    timed = [(peer, processes) for peer in ("hf_mlx", "trl", "torch") for processes in (1, 2)]
    assert [(peer, processes) for peer, processes, part in found if part == "speed"] == timed
    assert all(len(found[peer, processes, "speed"]) == processes for peer, processes in timed)
    assert all(rank["seconds"] > 0 and rank["peak"] > 0 for one in timed for rank in found[*one, "speed"])
    # Two processes, one of as many rows, one that accumulates, and TRL's two, on rows of uneven length.
    ours = found["hf_mlx", 2, "check"]
    assert len(ours[0]["log"]) == 2 and ours[0]["weights"] == ours[1]["weights"]
    for key in (("hf_mlx", 1, "check"), ("hf_mlx", 1, "accumulated"), ("trl", 2, "check")):
        for expected, entry in zip(found[key][0]["log"], ours[0]["log"], strict=True):
            assert entry == pytest.approx(expected, rel=5e-6), key
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[:2] for line in lines if line[:1] in (["hf_mlx"], ["trl"], ["torch"])] == [
        [peer, str(processes)] for peer, processes in timed
    ]
    assert "trained weights on all ranks: bitwise equal" in done.stdout
