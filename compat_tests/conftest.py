"""Set up before any test module is imported: a fast BLAS for MLX on one thread, and no hub."""

import functools
import gc
import importlib.metadata
import os
import sys

import pytest
from compiling import compiles_all, uncompiled_if

from hf_mlx.blas import load_openblas

# Processes of tests import this library a hundred times, and a container may ask not to keep what Python compiles.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
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
    # accelerate parses the metadata of peft in each of its steps: a tenth of a tiny run of TRL.
    importlib.metadata.metadata = functools.cache(importlib.metadata.metadata)


@pytest.fixture(scope="session", autouse=True)
def kernel_header():
    """The header of MLX's kernels, compiled: as every trainer does, for the tests that have none."""
    from hf_mlx.training.kernel_header import compiling_header  # after the BLAS

    with compiling_header():
        pass


@pytest.fixture(autouse=True)
def unhashed(request, monkeypatch):
    """Take datasets' own random fingerprints, of rows whose functions cannot be hashed.

    To hash the functions that TRL prepares rows with takes longer than they do. No cache is read by them here, since
    rows in memory have none. A run that has the wide comparisons in it hashes them.
    """
    datasets = sys.modules.get("datasets")
    if datasets is not None and not compiles_all(request.config):
        for module in (datasets.fingerprint, datasets.arrow_dataset):
            monkeypatch.setattr(module, "update_fingerprint", _draw_fingerprint)


def _draw_fingerprint(fingerprint, transform, transform_args):
    return sys.modules["datasets"].fingerprint.generate_random_fingerprint()


@pytest.fixture
def uncompiled(request):
    """Compute the same functions without mx.compile, for what is compared over many kinds of models.

    On the Linux CPU each kind has kernels of its own, which g++ takes longer to compile than the test to compare. A run
    that has the wide comparisons in it compiles them.
    """
    with uncompiled_if(not compiles_all(request.config)):
        yield
