"""The limits on MLX's pending work: given at the start only, and never against the user."""

import os
from types import SimpleNamespace

import mlx.core as mx
import pytest

from hf_mlx.device import BUFFERS, WIDTH
from hf_mlx.settings.plan import PairLossPlan, ScoreLossPlan
from hf_mlx.training.command_buffers import limit_pending_work, wait_for_memory


def plan(*, checkpointing=False, use_cpu=False, rows=8, tokens=1024, loss=None, lora="an adapter", dtype="float32"):
    return SimpleNamespace(
        lora=lora,
        model=SimpleNamespace(precision=SimpleNamespace(dtype=dtype)),
        use_cpu=use_cpu,
        checkpointing=SimpleNamespace(enabled=checkpointing),
        batch=SimpleNamespace(train_batch_size=rows),
        data=SimpleNamespace(max_length=tokens),
        loss=loss,
    )


@pytest.fixture
def cuda(monkeypatch):
    """A machine with a CUDA device, as far as the function can see, and a user who has set nothing."""
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    for name in (*BUFFERS, WIDTH):
        monkeypatch.delenv(name, raising=False)


def test_a_run_with_checkpointing_gets_smaller_buffers_and_the_environment_stays(cuda):
    before = dict(os.environ)
    recomputed, kept = (limit_pending_work(plan(checkpointing=enabled)) for enabled in (True, False))

    assert int(recomputed["MLX_MAX_MB_PER_BUFFER"]) < int(kept["MLX_MAX_MB_PER_BUFFER"])
    assert dict(os.environ) == before


def test_smaller_micro_batches_get_smaller_buffers(cuda):
    sizes = [(64, 1024), (8, 1024), (1, None), (4, 1024), (2, 1024), (1, 16)]
    given = [int(limit_pending_work(plan(rows=r, tokens=t))["MLX_MAX_MB_PER_BUFFER"]) for r, t in sizes]

    assert given == sorted(given, reverse=True)
    assert given[0] == given[1] == given[2] > given[3] > given[4] >= given[5] > 0


def test_all_weights_in_float32_get_smaller_buffers(cuda):
    wide, narrow = (limit_pending_work(plan(lora=None, dtype=dtype)) for dtype in ("float32", "bfloat16"))

    assert narrow == limit_pending_work(plan())
    assert int(wide["MLX_MAX_MB_PER_BUFFER"]) == int(narrow["MLX_MAX_MB_PER_BUFFER"]) // 2


@pytest.mark.parametrize("loss", [PairLossPlan(), ScoreLossPlan()])
def test_both_texts_of_a_pair_count(cuda, loss):
    assert limit_pending_work(plan(rows=4, loss=loss)) == limit_pending_work(plan(rows=8))


@pytest.mark.parametrize("name", BUFFERS)
def test_what_the_user_has_set_stays(cuda, monkeypatch, name):
    monkeypatch.setenv(name, "7")
    monkeypatch.setenv(WIDTH, "3")

    assert limit_pending_work(plan()) == {}
    assert (os.environ[name], os.environ[WIDTH]) == ("7", "3")


def test_buffers_are_left_alone_on_a_cpu(cuda, monkeypatch):
    assert set(limit_pending_work(plan(use_cpu=True))) == {WIDTH}
    monkeypatch.setattr(mx.cuda, "is_available", lambda: False)
    assert set(limit_pending_work(plan())) == {WIDTH}


class Backend:
    """What the limit asks of ``mlx.core``, with a CUDA device or without."""

    gpu = "gpu"

    def __init__(self, *, cuda):
        self.cuda = SimpleNamespace(is_available=lambda: cuda)
        self.limit = 1000

    def default_device(self):
        return self.gpu

    def get_memory_limit(self):
        return self.limit

    def set_memory_limit(self, limit):
        earlier, self.limit = self.limit, limit
        return earlier


@pytest.mark.parametrize(("need", "during"), [(400, 400), (4000, 1000)])
def test_a_run_with_checkpointing_waits_for_memory_and_puts_the_limit_back(need, during):
    backend = Backend(cuda=True)

    with pytest.raises(KeyError), wait_for_memory(plan(checkpointing=True), lambda: need, backend):
        assert backend.limit == during
        raise KeyError
    assert backend.limit == 1000


@pytest.mark.parametrize(("cuda", "checkpointing"), [(True, False), (False, True)])
def test_other_runs_keep_mlxs_limit(cuda, checkpointing):
    backend = Backend(cuda=cuda)

    with wait_for_memory(plan(checkpointing=checkpointing), lambda: pytest.fail("not needed"), backend):
        assert backend.limit == 1000
