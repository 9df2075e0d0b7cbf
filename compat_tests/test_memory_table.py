"""The table of what fits a Mac: blocks are counted as a whole model's are, and the page has every row."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SIZES = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("memory_table", ROOT / "benchmarks" / "memory_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_two_blocks_tell_of_five(benchmark, model_type, tmp_path):
    for way in benchmark.WAYS:
        one, two, five = (
            benchmark.measure(
                benchmark.make_folder(
                    tmp_path / f"{way} {blocks}", model_type, {**SIZES, "num_hidden_layers": blocks},
                    quantised=way == benchmark.WAYS[0],
                ),
                way, 256,
            )
            for blocks in (1, 2, 5)
        )  # fmt: skip
        assert benchmark.extend(one, two, 5) == pytest.approx(five.total / 2**30, rel=1e-6)
        assert one.total < two.total < five.total


def test_what_fits_is_said_with_the_estimates_error(benchmark):
    room = benchmark.MACS
    assert benchmark.show(room[16] / 1.5) == f"{room[16] / 1.5:.1f} GiB: 16 GB"
    assert benchmark.show(room[16]) == f"{room[16]:.1f} GiB: 32 GB, perhaps 16 GB"
    assert benchmark.show(room[64] + 1).endswith("none of these")


def test_the_page_has_every_row(benchmark):
    page = (ROOT / "docs" / "memory.md").read_text()
    begin, end = map(re.escape, benchmark.MARKS)
    (table,) = re.findall(f"{begin}\n(.*)\n{end}", page, flags=re.DOTALL)
    rows = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[2:]]
    assert rows == list(benchmark.MODELS)
    assert all(len(line.split(" | ")) == 7 for line in table.splitlines()[2:])
