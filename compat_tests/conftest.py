"""Set up before any test module is imported: a fast BLAS for MLX on one thread, and no hub."""

import gc
import os

import pytest
from compiling import compiles_all, uncompiled_if

from hf_mlx.blas import load_openblas

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# As `make test` does: how many cores a machine has must not decide what a test sees.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
load_openblas()
# Imports make a million objects and no garbage.
gc.disable()


def pytest_collection_finish():
    """Take what the imports made out of later collections: accelerate collects garbage in each run of TRL."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
    gc.enable()


@pytest.fixture
def uncompiled(request):
    """Compute the same functions without mx.compile, for what is compared over many kinds of models.

    On the Linux CPU each kind has kernels of its own, which g++ takes longer to compile than the test to compare. A run
    that has the wide comparisons in it compiles them.
    """
    with uncompiled_if(not compiles_all(request.config)):
        yield
