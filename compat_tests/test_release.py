"""A release as a stranger meets it: the README's own lines in a new environment with the built wheel.

The environment has what pip resolves today, but for torch, which is pinned: its newest build would bring gigabytes.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from pages import ROOT, blocks, swapped_script
from pairs import text_rows, tiny_model

TORCH = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
# Where the README names a model and rows of the hub, folders of these names stand in: the libraries look there first.
MODEL, ROWS = "HuggingFaceTB/SmolLM2-135M-Instruct", "trl-lib/Capybara"

pytestmark = [pytest.mark.wide, pytest.mark.timeout(3000)]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of the sdist, as a release builds them; from a copy, so that nothing built earlier gets in."""
    folder = tmp_path_factory.mktemp("release")
    built = shutil.ignore_patterns(
        ".*", "build", "dist", "*.egg-info", "__pycache__", "_build", "_generated", "*-output"
    )
    shutil.copytree(ROOT, folder / "source", ignore=built)
    (folder / "sdist").mkdir()
    build = "from setuptools.build_meta import build_sdist; build_sdist('../sdist')"
    subprocess.run([sys.executable, "-c", build], cwd=folder / "source", check=True, capture_output=True)
    (sdist,) = (folder / "sdist").glob("*.tar.gz")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", str(folder), str(sdist)], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def clean(wheel, tmp_path_factory) -> Path:
    """A new environment's bin folder, with the wheel and what the README says beside it."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder / "env", with_pip=True)
    programs = folder / "env" / "bin"
    extras = "cpu,hf" if sys.platform == "linux" else "hf"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(
        [str(programs / "python"), "-m", "pip", "install", "--quiet", f"{wheel}[{extras}]", TORCH],
        check=True, env={**environment, "PIP_CONSTRAINT": os.devnull},
    )  # fmt: skip
    return programs


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Path:
    """A folder in which the README's names exist."""
    folder = tmp_path_factory.mktemp("desk")
    tiny_model("llama", folder / MODEL, rope_theta=10_000.0)
    (folder / ROWS).mkdir(parents=True)
    rows = "".join(json.dumps({"text": row["text"][:60]}) + "\n" for row in text_rows(40))
    (folder / ROWS / "train.jsonl").write_text(rows)
    (folder / "args.json").write_text('{"optim": "adamw_8bit", "packing": true}')
    script = swapped_script()
    if sys.platform == "linux":
        # As the README says of the Linux CPU.
        script = script.replace("max_steps=100)", "max_steps=100, use_cpu=True)")
    (folder / "train.py").write_text(script)
    return folder


def run(clean, desk, *words) -> subprocess.CompletedProcess:
    ours = ("PYTHONPATH", "HF_MLX_REPORT")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    environment |= {"PATH": f"{clean}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        list(map(str, words)), cwd=desk, capture_output=True, text=True, env=environment, timeout=1500
    )
    assert done.returncode == 0, f"{words}: {done.stderr[-3000:]}"
    return done


def test_the_readmes_lines_train_verify_and_export(clean, desk):
    found = run(clean, desk, clean / "python", "-c", "import hf_mlx; print(hf_mlx.__file__, hf_mlx.__version__)").stdout
    assert found.startswith(str(clean.parent))
    assert "tested with transformers" in run(clean, desk, "hf-mlx", "--version").stdout
    # The swap, as it is printed.
    run(clean, desk, clean / "python", "train.py")
    assert (desk / "out" / "report.html").exists()
    assert (desk / "out" / "adapter" / "adapter_model.safetensors").exists()
    (block,) = (block for block in blocks("README.md", "console") if "hf-mlx verify" in block)
    commands = [shlex.split(line.removeprefix("$ ")) for line in block.splitlines()]
    for words in commands:
        run(clean, desk, *words, *(["--limit", "1000"] if "--self-test" in words else []))
    assert [words[1] for words in commands] == ["verify", "doctor", "export", "install", "export", "merge"]
    assert (desk / "out" / "mlx-lm" / "adapters.safetensors").exists()
    assert (desk / "out" / "adapter.gguf").exists() and (desk / "out" / "merged" / "config.json").exists()
    # The commands of the table of claims that take no minutes.
    claims = set(re.findall(r"`(hf-mlx (?:explain|verify|--version)[^`]*)`", (ROOT / "README.md").read_text()))
    assert len(claims) == 3
    for line in claims:
        run(clean, desk, *line.split())
    # And what is in python blocks: explain, and the adapter's proof.
    python = blocks("README.md", "python")
    assert len(python) >= 1
    for number, block in enumerate(python):
        (desk / f"block_{number}.py").write_text(block)
        run(clean, desk, clean / "python", f"block_{number}.py")


def test_an_unedited_script_trains_too(clean, desk):
    (diff,) = blocks("README.md", "diff")
    before = "\n".join(line[1:] for line in diff.splitlines() if not line.startswith("+"))
    (desk / "unedited.py").write_text(
        before.replace('output_dir="out"', 'output_dir="again"').replace("out/", "again/")
    )
    done = run(clean, desk, "hf-mlx", "run", "unedited.py")
    assert "HONOUR" in done.stderr
    assert sorted(one.name for one in (desk / "again").iterdir()) == ["README.md", "adapter", "checkpoint-100"]
