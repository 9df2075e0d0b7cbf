"""A fast BLAS for MLX's CPU backend on Linux.

The Linux wheel ``mlx-cpu`` bundles the reference BLAS, whose matrix products are about 145 times
slower than OpenBLAS's (1024x576x1536 in fp32: 1.5 s against 11 ms on two cores). Symbols that are
already in the global scope win over the bundled ones, so OpenBLAS has to be loaded before
``mlx.core`` is. Macs use Accelerate and Metal, and the CUDA wheels use cuBLAS: nothing is done there.
"""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

logger = logging.getLogger(__name__)

# The loader's own search path first, then a conda prefix and the folders of distributions that keep it aside.
_LIBRARIES = (
    "libopenblas.so.0",
    "libopenblas.so",
    "libopenblasp.so.0",
    f"{sys.prefix}/lib/libopenblas.so.0",
    "/usr/lib/x86_64-linux-gnu/openblas-pthread/libopenblas.so.0",
    "/usr/lib/aarch64-linux-gnu/openblas-pthread/libopenblas.so.0",
    "/usr/lib64/libopenblas.so.0",
    "/usr/local/lib/libopenblas.so.0",
)
_CUDA_WHEELS = ("mlx-cuda-13", "mlx-cuda-12", "mlx-cuda")
_HINT = (
    "MLX on the Linux CPU uses a reference BLAS, about 145x slower than OpenBLAS, which was not found: "
    "apt-get install libopenblas0-pthread"
)


class _Once:
    """Whether this process has looked already, and what it loaded."""

    looked = False
    library: str | None = None


def load_openblas() -> str | None:
    """Load OpenBLAS for MLX's CPU backend, once a process and before MLX itself.

    Does nothing on any platform but Linux, where a CUDA build of MLX is installed, or when
    ``mlx.core`` is loaded already (too late: its symbols are bound). Where OpenBLAS is not found,
    one line in the log says which package brings it.

    Returns:
        The name or path of the library that was loaded, or None.
    """
    if not _Once.looked and _wants_openblas():
        _Once.looked = True
        _Once.library = _load_first(_LIBRARIES)
        if _Once.library is None:
            logger.warning(_HINT)
    return _Once.library


def started_without_openblas() -> bool:
    """Whether ``mlx.core`` was imported on the Linux CPU before anything put OpenBLAS in the global scope."""
    if sys.platform != "linux" or _Once.looked or "mlx.core" not in sys.modules or _has_cuda_wheel():
        return False
    return not hasattr(ctypes.CDLL(None), "openblas_get_num_threads")


def blas_threads() -> int | None:
    """Threads that OpenBLAS computes a product with; None where it was not loaded here."""
    library = _openblas()
    return None if library is None else library.openblas_get_num_threads()


@contextmanager
def single_threaded_blas() -> Iterator[None]:
    """Products on one thread each inside the block, so that several can be computed side by side."""
    library = _openblas()
    if library is None:
        yield
        return
    threads = library.openblas_get_num_threads()
    library.openblas_set_num_threads(1)
    try:
        yield
    finally:
        library.openblas_set_num_threads(threads)


def _openblas() -> ctypes.CDLL | None:
    return None if _Once.library is None else ctypes.CDLL(_Once.library)


def _wants_openblas() -> bool:
    return sys.platform == "linux" and "mlx.core" not in sys.modules and not _has_cuda_wheel()


def _has_cuda_wheel() -> bool:
    for name in _CUDA_WHEELS:
        try:
            metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        return True
    return False


def _load_first(libraries: tuple[str, ...]) -> str | None:
    """Load the first library that exists into the global symbol scope; its name, or None."""
    for library in libraries:
        if "/" in library and not Path(library).exists():
            continue
        try:
            ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return library
    return None
