"""The table of works: what was measured is not run again, and the page gets every line of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu_table.py"
PAGE = "before\n<!-- gpu_table: begin -->\nold\n<!-- gpu_table: end -->\nafter\n"


def run(*words):
    done = subprocess.run([sys.executable, SCRIPT, *map(str, words)], capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def cells(page):
    """{work: the other columns}."""
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")][2:]
    return {line[0]: line[1:] for line in lines}


def test_a_measured_table_is_written_into_its_page(tmp_path):
    kept, page = tmp_path / "table.json", tmp_path / "page.md"
    page.write_text(PAGE)
    peers = {"hf_mlx": (0.1, 10), "trl": (0.2, 20), "mlx-lm": (0.3, 30)}
    entries = {peer: {"seconds": seconds, "peak": gib * 2**30} for peer, (seconds, gib) in peers.items()}
    works = {"LoRA": entries, "LoRA, long rows": {"trl": entries["trl"], "mlx-lm": entries["mlx-lm"]}}
    kept.write_text(json.dumps({"works": works, "speed": 8e14, "versions": {"mlx": "1", "machine": "m"}}))
    run("--json", kept, "--write", page, "--works", "LoRA", "--peers", "hf_mlx", "trl", "mlx-lm")

    assert page.read_text().startswith("before\n") and page.read_text().endswith("after\n")
    found = cells(page.read_text())
    assert list(found) == ["LoRA"] and "old" not in page.read_text()
    shape, floor, *figures = found["LoRA"]
    assert shape == "8 x 1024" and figures == [
        "100 ms, 10.0 GiB", "200 ms, 20.0 GiB", "300 ms, 30.0 GiB", "2.00, 0.50"
    ]  # fmt: skip
    # 1.07 billion weights beside the embedding, 4 operations a token for each, and attention.
    assert float(floor.split()[0]) == pytest.approx(
        1e3 * (4 * 1.073e9 * 8192 + 7 * 1024 * 8192 * 2048 * 16) / 8e14, rel=0.02
    )
    assert "earlier run" not in page.read_text()

    kept.write_text(json.dumps({"works": {"all weights": entries}, "speed": 8e14, "versions": {"mlx": "1"}}))
    run("--json", kept, "--write", page, "--works", "all weights")
    later = cells(page.read_text())
    assert list(later) == ["LoRA", "all weights"] and later["LoRA"] == found["LoRA"]
    assert "Of an earlier run: LoRA." in page.read_text()


@pytest.mark.wide
@pytest.mark.timeout(1800)
def test_every_peer_is_measured_on_dense_and_expert_works(tmp_path):
    kept = tmp_path / "table.json"
    wanted = ["all weights", "experts, LoRA", "qwen3-0.6b, LoRA, accumulation of 8"]
    run("--json", kept, "--tiny", "--works", *wanted)
    works = json.loads(kept.read_text())["works"]
    assert {work: sorted(peers) for work, peers in works.items()} == {
        work: ["hf_mlx", "mlx-lm", "trl"] for work in wanted
    }
    assert all(entry["seconds"] > 0 and entry["peak"] > 0 for peers in works.values() for entry in peers.values())
    # Cut off after a line: only what is missing is run.
    before = kept.read_text()
    assert list(cells(run("--json", kept, "--tiny", "--works", *wanted))) == wanted and kept.read_text() == before
