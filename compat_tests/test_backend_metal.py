"""What a Mac asks of MLX, in a process whose MLX reports Metal and lacks what Metal lacks; see fake_metal."""

import json
from pathlib import Path

import pytest
from compiling import compiles_all
from fake_metal import CACHE, INFO, KINDS
from forked_scripts import run_forked
from pairs import tiny_model

HERE = Path(__file__).parent


def trained(model: Path, *kinds: str, **environ: str) -> dict:
    # MLX is not among what a fork has imported.
    done = run_forked([HERE / "fake_metal.py", model, *kinds], environ={"HF_MLX_REPORT": "0", **environ})
    return json.loads(done.stdout.splitlines()[-1])


FEW = ["pissa", "full"]


@pytest.mark.parametrize("kinds", [FEW, pytest.param([*KINDS], marks=pytest.mark.wide)], ids=["a sample", "every kind"])
def test_everything_is_imported_and_trained_without_what_metal_lacks(tmp_path, kinds, request):
    # As ``uncompiled``: g++ would build the kernels of both steps, which are the Linux CPU's.
    environ = {} if compiles_all(request.config) else {"MLX_DISABLE_COMPILE": "1"}
    found = trained(tiny_model("llama", tmp_path / "llama"), *kinds, **environ)
    assert found["modules"] > 200
    assert set(found["runs"]) == set(kinds)
    assert all(len(run["losses"]) == 2 and max(run["losses"]) < 10 for run in found["runs"].values())
    # For the Linux CPU alone: never reached.
    assert found["lanes"] == found["exponentials"] == 0
    # Each run wires what the device recommends and gives it back.
    assert found["wired"] == [INFO["max_recommended_working_set_size"], 0] * len(kinds)
    # And keeps no more freed memory than its step needs.
    assert found["cached"][1::2] == [CACHE] * len(kinds)
    assert len(found["cached"]) == 2 * len(kinds) and all(0 < limit < 2**25 for limit in found["cached"][::2])


@pytest.mark.wide
@pytest.mark.parametrize("family", ["gemma3_text", "qwen3_moe", "qwen3_next", "mamba2"])
def test_other_families_reach_no_kernel_without_a_gradient(tmp_path, family):
    from architecture_zoo import make_model
    from pairs import tokenizer

    model = make_model(family, vocab_size=len(tokenizer()))
    model.save_pretrained(tmp_path / family)
    tokenizer().save_pretrained(tmp_path / family)
    found = trained(tmp_path / family, "full")
    assert found["kernels"] == found["lanes"] == found["exponentials"] == 0
