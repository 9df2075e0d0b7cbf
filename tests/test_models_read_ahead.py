"""Weight files are read beside other work, for as long as that work takes and no longer."""

from __future__ import annotations

import os
import threading

import pytest

from hf_mlx.models.read_ahead import read_ahead

MIB = 1 << 20


NAME = "hf_mlx-read-ahead"


@pytest.fixture
def folder(tmp_path):
    """A file that takes a while to read, and no room on the disk."""
    (tmp_path / "model.safetensors").touch()
    os.truncate(tmp_path / "model.safetensors", 1024 * MIB)
    return tmp_path


def reading() -> bool:
    return any(thread.name == NAME for thread in threading.enumerate())


def test_files_are_read_while_the_block_runs_and_let_go_at_its_end(folder):
    with read_ahead(folder):
        assert reading()
    assert not reading()


def test_an_error_in_the_block_comes_out_at_once(folder):
    with pytest.raises(ValueError, match="a bad row"), read_ahead(folder):
        assert reading()
        raise ValueError("a bad row")
    assert not reading()


@pytest.mark.timeout(60)
def test_a_pipe_in_place_of_a_file_is_not_waited_for(folder):
    os.mkfifo(folder / "model-00002-of-00002.safetensors")
    with read_ahead(folder):
        pass
    assert not reading()


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
