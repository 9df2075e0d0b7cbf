"""Set up before any test module is imported: a fast BLAS for MLX on one thread, and no hub."""

import os
import sys

import pytest

from hf_mlx.blas import load_openblas

# Processes of tests import this library a hundred times, and a container may ask not to keep what Python compiles.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# As `make test` does: how many cores a machine has must not decide what a test sees.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
load_openblas()


@pytest.fixture(scope="session", autouse=True)
def kernel_header():
    """The header of MLX's kernels, compiled: as every trainer does, for the tests that have none."""
    from hf_mlx.training.kernel_header import compiling_header  # after the BLAS

    with compiling_header():
        pass
