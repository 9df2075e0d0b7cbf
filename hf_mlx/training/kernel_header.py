"""The header that g++ reads for every kernel of MLX on the Linux CPU, compiled once.

MLX writes a kernel into its folder of kernels and calls g++, which reads <complex>, <functional> and MLX's operations
first: a second, of which the kernel itself takes a tenth. A quoted include is looked for beside the file that has it,
a precompiled one before a plain one, and one that another compiler made is passed over. So it lies there. The machine
code is the same.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import mlx.core as mx

from ..device import on_cpu
from ..locks import try_lock

HEADER = Path("mlx/backend/cpu/compiled_preamble.h")
# Without the strings, streams and Bessel functions that <complex> brings: g++ instantiates their templates for each
# kernel again, even compiled ones. Nothing of a stream but its name is instantiated.
_LEAN = """\
#include <bits/c++config.h>
#undef _GLIBCXX_USE_STD_SPEC_FUNCS
#include <iosfwd>
#include <limits>
#include <type_traits>
#define _GLIBCXX_SSTREAM 1
namespace std { struct ios_base { static const int failbit = 4; }; }
#include "mlx/backend/cpu/compiled_preamble.h"
"""
# By the flags that MLX calls g++ with (mlx 0.32, JitCompiler::build_command): code for others would be passed over.
# Another standard library than GCC's may want the whole header, and where g++ cannot map such a file into memory, there
# is to be none: it gets its name once a kernel was compiled with it.
_COMPILE = """\
out=$1 lean=$2 whole=$3 include=$4 folder=${1%/*}
compile() { g++ -std=c++17 -O3 -fPIC -w "$@"; }
for header in "$lean" "$whole"; do
  compile -x c++-header -I "$include" "$header" -o "$folder/$$.h.gch" &&
  echo "#include \\"$$.h\\"
  float kernel(float x) { return mlx::core::detail::Exp()(x); }" | compile -I "$folder" -x c++ -S -o - - &&
  mv "$folder/$$.h.gch" "$out" && break
done
rm -f "$folder/$$.h.gch"
"""


def kernel_folder() -> Path:
    """Where MLX keeps its kernels: below the folder for temporary files, by C++'s rule for that."""
    named = (os.environ.get(name) for name in ("TMPDIR", "TMP", "TEMP", "TEMPDIR"))
    return Path(next((name for name in named if name is not None), "/tmp"), "mlx", mx.__version__, "cpu")  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def compiling_header() -> Iterator[None]:
    """A block beside which the header is compiled; at its end it is there for the kernels that follow.

    Does nothing where it is there already, on another device than the Linux CPU, and without g++. Of processes that
    start together one compiles, and the others wait at the end of their blocks.
    """
    end = _begin(kernel_folder()) if sys.platform == "linux" and on_cpu() and shutil.which("g++") else None
    yield
    if end is not None:
        end()


def _begin(folder: Path) -> Callable[[], object] | None:
    """Start g++, unless another process has; what waits for its end."""
    target = folder / f"{HEADER}.gch"
    include = Path(mx.__file__).parent / "include"
    if target.exists() or not (include / HEADER).exists():
        return None
    lean, lock = target.with_name("lean.h"), target.with_name("lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_CREAT | os.O_RDWR)
    except OSError:
        return None  # MLX will say that it cannot write there
    try:
        if try_lock(descriptor) is False:
            return partial(_wait_for, lock)
        lean.write_text(_LEAN)
        # It holds the lock for as long as it runs.
        return subprocess.Popen(
            ["sh", "-c", _COMPILE, "sh", target, lean, include / HEADER, include],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[descriptor],
        ).wait
    finally:
        os.close(descriptor)


def _wait_for(lock: Path) -> None:
    with open(lock) as file:
        fcntl.flock(file, fcntl.LOCK_SH)
