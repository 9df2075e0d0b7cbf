"""Weight files are read beside other work, for as long as that work takes and no longer."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from hf_mlx.models.read_ahead import read_ahead

MIB = 1 << 20


class Tap:
    """A weight file that is a pipe: what is read of it was taken by someone."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "model.safetensors"
        os.mkfifo(self.path)
        self.taken, self.closed = 0, False
        self._first = threading.Event()
        self._thread = threading.Thread(target=self._pour, daemon=True)
        self._thread.start()

    def _pour(self) -> None:
        try:
            with self.path.open("wb", buffering=0) as pipe:
                for _ in range(1 << 14):
                    self.taken += pipe.write(bytes(MIB))
                    self._first.set()
        except BrokenPipeError:
            self.closed = True

    def wait(self) -> None:
        assert self._first.wait(10)

    def join(self) -> None:
        self._thread.join(10)
        assert not self._thread.is_alive()


def test_files_are_read_while_the_block_runs_and_let_go_at_its_end(tmp_path):
    tap = Tap(tmp_path)
    with read_ahead(tmp_path):
        tap.wait()
    tap.join()
    assert tap.taken >= MIB and tap.closed


def test_an_error_in_the_block_comes_out_at_once(tmp_path):
    tap = Tap(tmp_path)
    with pytest.raises(ValueError, match="a bad row"), read_ahead(tmp_path):
        tap.wait()
        raise ValueError("a bad row")
    tap.join()
    assert tap.closed


def test_files_larger_than_half_of_the_memory_are_left_alone(tmp_path):
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 6 // 10
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, size)  # sparse: takes no room on the disk
    before = threading.active_count()
    with read_ahead(tmp_path):
        assert threading.active_count() == before


def test_a_folder_without_weights_or_with_unreadable_ones_is_no_error(tmp_path):
    with read_ahead(tmp_path):
        pass
    (tmp_path / "model.safetensors").mkdir()
    with read_ahead(tmp_path):
        pass
