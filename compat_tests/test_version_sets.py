"""The sets of versions that a release says it was tested with: training, saving and bridges beside upstream in each."""

import json
import os
import re
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest
from version_sets import SETS, overlay, packages

from hf_mlx.version import TESTED

HERE = Path(__file__).parent


def test_the_bounds_are_those_of_the_sets_and_of_the_package():
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]
    required = [*project["dependencies"], *project["optional-dependencies"]["hf"]]
    lower = dict(re.fullmatch(r"([\w-]+)>=([\d.]+)", line).groups() for line in required if ">=" in line)
    assert len(SETS) >= 3
    for name, (low, high) in TESTED.items():
        assert (low, high) == (SETS["lowest"][name], SETS["highest"][name])
        assert low.startswith(lower[name]), name


@pytest.mark.wide
@pytest.mark.parametrize("name", SETS)
def test_a_set_trains_saves_and_exports_as_upstream(name):
    folder = overlay(name)
    paths = [folder, HERE, HERE.parent, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(HERE / "version_run.py"), *packages(name)],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["versions"] == packages(name)
    assert found["imported"] == {key: SETS[name][key] for key in ("transformers", "mlx")}
    for kind in ("sft", "dpo"):
        ours, theirs = (list(chain(*found[f"{kind}, {side}"])) for side in ("ours", "theirs"))
        assert len(ours) == 8
        # fp32 on both sides, sums in another order.
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert found["resumed from trl"] == pytest.approx([loss for loss, _ in found["sft, theirs"]], rel=1e-4)
    assert found["verified"] and found["lora tensors"] == 2 * 7 * 2
    assert found["exported"] == 0
    assert "was tested with" not in done.stderr
