"""The header of MLX's kernels is compiled once, g++ reads it for each kernel, and nothing breaks where it cannot be."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from sampling import sampled

from hf_mlx.training import kernel_header
from hf_mlx.training.kernel_header import HEADER, compiling_header, kernel_folder

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or mx.default_device() != mx.Device(mx.cpu) or shutil.which("g++") is None,
    reason="MLX calls g++ on the Linux CPU alone",
)

# Of a process of its own: MLX's folder of kernels stays what it was at the first of them.
PROGRAM = """
import mlx.core as mx
from hf_mlx.training.kernel_header import compiling_header
with compiling_header():
    x, y = mx.arange(1, 9) / 8, mx.ones(8) / 3
function = lambda x, y: mx.exp(x) * y + mx.sin(y)
assert mx.allclose(mx.compile(function)(x, y), function(x, y), rtol=1e-6)
"""


def start(folder: Path) -> subprocess.Popen:
    environment = {**os.environ, "TMPDIR": str(folder)}
    return subprocess.Popen([sys.executable, "-c", PROGRAM], env=environment, stderr=subprocess.PIPE, text=True)


def headers_read(source: Path) -> list[str]:
    """The first header that g++ reads for a file, ``!`` before a compiled one."""
    include = Path(mx.__file__).parent / "include"
    command = ["g++", "-std=c++17", "-O3", "-Wall", "-fPIC", "-H", "-S", "-I", include, "-o", "-", source]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stderr.splitlines()[0].split(maxsplit=1)


def test_processes_that_start_together_compile_it_once_and_their_kernels_are_built_with_it(tmp_path, monkeypatch):
    for process in [start(tmp_path) for _ in range(2)]:
        assert process.wait(120) == 0, process.communicate()[1]
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    folder = kernel_folder()
    assert headers_read(next(folder.glob("*.cpp"))) == ["!", str(folder / f"{HEADER}.gch")]
    assert sorted(path.name for path in (folder / HEADER).parent.iterdir()) == [f"{HEADER.name}.gch", "lean.h", "lock"]
    made = (folder / f"{HEADER}.gch").stat().st_mtime_ns
    with compiling_header():
        pass
    assert (folder / f"{HEADER}.gch").stat().st_mtime_ns == made


@pytest.mark.parametrize(
    "short", sampled(["#error another library\n", "// without operations\n"], "// without operations\n")
)
def test_where_the_short_header_does_not_do_the_whole_one_is_taken(tmp_path, monkeypatch, short):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(kernel_header, "_LEAN", short)
    with compiling_header():
        pass
    folder = kernel_folder()
    (folder / "kernel.cpp").write_text(f'#include "{HEADER}"\nfloat half(float x) {{ return x / 2; }}\n')
    assert headers_read(folder / "kernel.cpp") == ["!", str(folder / f"{HEADER}.gch")]


def test_a_compiler_that_fails_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "g++").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "g++").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with compiling_header():
        pass
    assert sorted(path.name for path in (kernel_folder() / HEADER).parent.iterdir()) == ["lean.h", "lock"]


def test_a_folder_that_cannot_be_written_is_left_to_mlx(tmp_path, monkeypatch):
    (tmp_path / "mlx").write_text("a file where MLX's folder would be")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with compiling_header():
        pass
    assert (tmp_path / "mlx").is_file()
