"""OpenBLAS is loaded before MLX on the Linux CPU, and only there."""

import ctypes
import logging
import subprocess
import sys

import pytest

from hf_mlx import blas

# Milliseconds for a 1024x576x1536 product: about 11 with OpenBLAS and 820 to 1550 without, so a busy machine fits.
PRODUCT_BUDGET = 300
# A name that needs MLX, and not transformers, whose import would be most of these processes.
TIMED_PRODUCT = """
import time, hf_mlx
hf_mlx.verify_adapter
import mlx.core as mx
a, b = mx.ones((1024, 576)), mx.ones((576, 1536))
mx.eval(a, b)
times = []
for _ in range(5):
    start = time.perf_counter()
    mx.eval(a @ b)
    times.append(1000 * (time.perf_counter() - start))
print(min(times))
"""


@pytest.fixture
def loads(monkeypatch):
    """Pretend that nothing was looked for yet; the libraries that are asked for, none of which exists."""
    asked = []

    def cdll(name, mode=0):
        asked.append((name, mode))
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(blas._Once, "looked", False)
    monkeypatch.setattr(blas._Once, "library", None)
    monkeypatch.setattr(ctypes, "CDLL", cdll)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(blas, "_has_cuda_wheel", lambda: False)
    monkeypatch.delitem(sys.modules, "mlx.core", raising=False)
    return asked


def test_products_are_fast_after_the_first_name_that_needs_mlx():
    if sys.platform != "linux" or blas._has_cuda_wheel():
        pytest.skip("only MLX's Linux CPU backend needs OpenBLAS")
    try:
        ctypes.CDLL("libopenblas.so.0")
    except OSError:
        pytest.skip("libopenblas0-pthread is not installed on this machine")
    done = subprocess.run([sys.executable, "-c", TIMED_PRODUCT], capture_output=True, text=True, check=True)
    assert float(done.stdout) < PRODUCT_BUDGET


def test_the_library_goes_into_the_global_scope(loads, monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name, mode=0: loads.append((name, mode)))
    assert blas.load_openblas() == "libopenblas.so.0"
    assert loads == [("libopenblas.so.0", ctypes.RTLD_GLOBAL)]


def test_a_missing_library_is_said_once(loads, caplog):
    with caplog.at_level(logging.WARNING):
        assert blas.load_openblas() is None
        assert blas.load_openblas() is None
    assert len(loads) >= 1
    assert [record.getMessage().endswith("apt-get install libopenblas0-pthread") for record in caplog.records] == [True]


def test_nothing_happens_on_a_mac(loads, monkeypatch, caplog):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert blas.load_openblas() is None
    assert (loads, caplog.records) == ([], [])


def test_nothing_happens_with_a_cuda_build(loads, monkeypatch, caplog):
    monkeypatch.setattr(blas, "_has_cuda_wheel", lambda: True)
    assert blas.load_openblas() is None
    assert (loads, caplog.records) == ([], [])


LATE = """
import logging, sys
logging.basicConfig(stream=sys.stdout, format="%(message)s")
if sys.argv[1] == "late":
    import mlx.core
import hf_mlx
hf_mlx.verify_adapter
import mlx.core
from hf_mlx.backends import prepare_backend
prepare_backend()
"""


@pytest.mark.parametrize("order", ["late", "early"])
def test_mlx_imported_first_is_said_once(order):
    if sys.platform != "linux" or blas._has_cuda_wheel():
        pytest.skip("only MLX's Linux CPU backend needs OpenBLAS")
    done = subprocess.run([sys.executable, "-c", LATE, order], capture_output=True, text=True, check=True)
    said = [line for line in done.stdout.splitlines() if "mlx.core was imported before hf_mlx" in line]
    assert len(said) == (order == "late")
    assert all("from hf_mlx import MLXSFTTrainer" in line for line in said)


def test_nothing_happens_once_mlx_is_loaded(loads, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "mlx.core", object())
    assert blas.load_openblas() is None
    assert (loads, caplog.records) == ([], [])
