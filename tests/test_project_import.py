"""``import hf_mlx`` is quick, brings nothing heavy with it, and offers the promised names."""

import json
import subprocess
import sys

import pytest

import hf_mlx

PUBLIC = {
    "MLXDPOTrainer",
    "MLXRewardTrainer",
    "MLXSFTTrainer",
    "MLXTrainer",
    "resolve_grad_clip",
    "GradClip",
    "explain",
    "export_adapter",
    "import_adapter",
    "verify_adapter",
    "HFMLXError",
}
HEAVY = ("torch", "mlx", "mlx_lm", "transformers", "datasets", "numpy")
# Seconds. Measured at 0.01 on two busy cores; 0.3 is what the project promises.
IMPORT_BUDGET = 0.3


def in_new_process(code: str) -> dict:
    """Run code that leaves a dict in ``result``, in a fresh interpreter."""
    program = f"import json, sys, time\n{code}\nprint(json.dumps(result))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return json.loads(done.stdout.splitlines()[-1])


def test_import_is_quick():
    timed = "start = time.perf_counter()\nimport hf_mlx\nresult = {'seconds': time.perf_counter() - start}"
    assert min(in_new_process(timed)["seconds"] for _ in range(3)) < IMPORT_BUDGET


def test_import_brings_in_nothing_heavy():
    loaded = in_new_process(f"import hf_mlx\nresult = {{name: name in sys.modules for name in {HEAVY!r}}}")
    assert loaded == dict.fromkeys(HEAVY, False)


@pytest.mark.parametrize("name", ["explain", "resolve_grad_clip", "GradClip", "HFMLXError"])
def test_settings_are_read_without_mlx_or_torch(name):
    code = f"import hf_mlx\nhf_mlx.{name}\nresult = {{name: name in sys.modules for name in ('torch', 'mlx')}}"
    assert in_new_process(code) == {"torch": False, "mlx": False}


def test_public_names_are_the_promised_ones():
    assert set(hf_mlx.__all__) == PUBLIC
    assert set(dir(hf_mlx)) >= PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_name_resolves_and_is_documented(name):
    value = getattr(hf_mlx, name)
    assert value.__name__ == name
    assert value.__doc__


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'hf_mlx' has no attribute 'SFTTrainer'"):
        _ = hf_mlx.SFTTrainer
