"""The wheel that people install: what is in it, and that it works from where pip puts it."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """Built by setuptools from a copy of what is versioned, so that the tree stays as it is."""
    folder = tmp_path_factory.mktemp("sdist")
    source = folder / "source"
    skipped = shutil.ignore_patterns("__pycache__", ".*", "build", "dist", "*.egg-info", "*-output", "_build")
    shutil.copytree(ROOT, source, ignore=skipped)
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=source)
    (built,) = folder.glob("*.tar.gz")
    return built


def test_the_sdist_holds_what_a_wheel_is_built_from(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"} <= names
    assert {name for name in names if name.endswith(".py")} == {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "hf_mlx").rglob("*.py")
    }


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """Built by pip from the sdist, as a release is."""
    folder = tmp_path_factory.mktemp("wheel")
    source = sdist
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", str(folder), str(source)], check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_holds_the_whole_package_and_nothing_else(wheel):
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "hf_mlx").rglob("*.py")}
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert len(sources) > 20
    assert files == sources


def test_wheel_says_what_it_is(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(archive.read(name).decode())
        licenses = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
    required = {line.split(">")[0] for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    assert metadata["Name"] == "hf-mlx"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert required >= {"mlx", "mlx-lm", "transformers", "datasets", "safetensors"}
    assert set(metadata.get_all("Provides-Extra")) == {"cpu", "cuda", "hf", "dev", "gguf", "docs"}
    assert len(licenses) == 1


def test_wheel_installs_and_runs(wheel, tmp_path):
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(tmp_path)]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True)
    code = "import hf_mlx; from hf_mlx.cli.main import main; print(hf_mlx.__file__); main(['--help'])"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path, env=environment
    )
    assert done.stdout.startswith(str(tmp_path))
    assert "usage: hf-mlx" in done.stdout
