"""What is done for a backend is where the table says, is done before MLX starts, and can be turned off."""

import os
import platform
import subprocess
import sys
from importlib import import_module

import pytest

from hf_mlx import backends
from hf_mlx.backends import MEASURES, WATCHDOG, macos_version, markdown_measures, prepare_backend
from hf_mlx.errors import TrainingError
from hf_mlx.training.shortage import Work, is_shortage, naming_shortage


def test_every_measure_is_where_the_table_says():
    for one in MEASURES:
        module, name = one.where.rsplit(".", 1)
        assert callable(getattr(import_module(f"hf_mlx.{module}"), name)), one.where
    assert {one.backend for one in MEASURES} == {"metal", "cuda", "cpu", "all"}
    assert markdown_measures().count("\n| ") == len(MEASURES) + 4


@pytest.mark.parametrize(("given", "expected"), [(None, "1"), ("0", "0"), ("", "")])
def test_a_macs_switch_is_set_unless_the_user_has(monkeypatch, given, expected):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    # Registered first, so that the variable is as it was afterwards.
    monkeypatch.setenv(WATCHDOG, "before")
    monkeypatch.delenv(WATCHDOG)
    if given is not None:
        monkeypatch.setenv(WATCHDOG, given)
    prepare_backend()
    assert os.environ[WATCHDOG] == expected


def test_it_is_set_before_mlx_is_imported():
    code = (
        "import sys, os, platform; sys.platform = 'darwin'; platform.machine = lambda: 'arm64'\n"
        "class Look:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == 'mlx.core': print(os.environ.get({WATCHDOG!r})); raise SystemExit\n"
        "sys.meta_path.insert(0, Look())\n"
        "import hf_mlx; hf_mlx.export_adapter"
    )
    environment = {name: value for name, value in os.environ.items() if name != WATCHDOG}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout == "1\n", done.stderr


def test_elsewhere_it_is_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv(WATCHDOG, raising=False)
    prepare_backend()
    assert WATCHDOG not in os.environ


@pytest.mark.parametrize(("told", "expected"), [("15.3.1", (15, 3)), ("26.0", (26, 0)), ("14", (14, 0)), ("", None)])
def test_the_version_of_macos(monkeypatch, told, expected):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(backends.platform, "mac_ver", lambda: (told, ("", "", ""), "arm64"))
    assert macos_version() == expected


def work() -> Work:
    return Work("step 3, 4 row(s) x 64 tokens at once", "room", ["max_length=32"])


# As reported for mlx 0.31 and 0.32.
STOPPED = [
    "[METAL] Command buffer execution failed: Impacting Interactivity "
    "(0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)",
    "[METAL] Command buffer execution failed: Caused GPU Timeout Error "
    "(00000002:kIOGPUCommandBufferCallbackErrorTimeout).",
]


@pytest.mark.parametrize("text", STOPPED)
def test_what_macos_stopped_is_said_as_what_to_write(text):
    with pytest.raises(TrainingError, match=r"step 3.*macOS stopped") as told, naming_shortage(work):
        raise RuntimeError(text)
    assert all(word in told.value.remedy for word in ("caffeinate -s", WATCHDOG, "max_length=32"))
    assert str(told.value.__cause__) == text


def test_metals_limit_of_buffers_is_no_lack_of_memory():
    error = RuntimeError("[metal::malloc] Resource limit (499000) exceeded.")
    assert not is_shortage(error)
    with pytest.raises(TrainingError, match="too many buffers") as told, naming_shortage(work):
        raise error
    assert "gradient_checkpointing=True" in told.value.remedy
