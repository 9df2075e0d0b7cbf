"""The limit on MLX's command buffers: set for the device's start only, and never against the user."""

import os
from types import SimpleNamespace

import mlx.core as mx
import pytest

from hf_mlx.training.command_buffers import VARIABLES, limit_command_buffers


def plan(*, checkpointing=False, use_cpu=False):
    return SimpleNamespace(use_cpu=use_cpu, checkpointing=SimpleNamespace(enabled=checkpointing))


@pytest.fixture
def cuda(monkeypatch):
    """A machine with a CUDA device, as far as the function can see, and a user who has set nothing."""
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_a_run_with_checkpointing_gets_smaller_buffers_and_the_environment_stays(cuda):
    before = dict(os.environ)

    assert limit_command_buffers(plan(checkpointing=True)) < limit_command_buffers(plan())
    assert dict(os.environ) == before


@pytest.mark.parametrize("name", VARIABLES)
def test_what_the_user_has_set_stays(cuda, monkeypatch, name):
    monkeypatch.setenv(name, "7")

    assert limit_command_buffers(plan()) is None
    assert os.environ[name] == "7"


def test_nothing_is_done_on_a_cpu(cuda, monkeypatch):
    assert limit_command_buffers(plan(use_cpu=True)) is None
    monkeypatch.setattr(mx.cuda, "is_available", lambda: False)
    assert limit_command_buffers(plan()) is None
