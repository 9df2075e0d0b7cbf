"""What is written appears whole or not at all: on a full disk, after a kill, beside a second process."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from adapter_folders import make_llama, trained

from hf_mlx.adapters.export import export_adapter
from hf_mlx.adapters.merge import merge_adapter
from hf_mlx.atomic import staged, tidy
from hf_mlx.checkpoints.files import check_output_dir, saved_folder
from hf_mlx.checkpoints.lock import LOCK, held
from hf_mlx.errors import AdapterError, CheckpointError, HFMLXError, ModelError
from hf_mlx.settings.plan import LoraPlan

FILES = ("config.json", "model.safetensors", "notes/a.txt")
# Each line that touches the disk, and some more.
MOMENTS = 60


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def write(folder: Path, mark: str) -> None:
    (folder / "notes").mkdir()
    for name in FILES:
        (folder / name).write_text(mark)


def save(folder: Path, mark: str) -> None:
    with staged(folder, ModelError) as temporary:
        write(temporary, mark)


@pytest.mark.parametrize("exists", [True, False])
def test_files_appear_together_and_others_stay(tmp_path, exists):
    folder = tmp_path / "out"
    if exists:
        save(folder, "old")
        (folder / "mine.txt").write_text("mine")
        (folder / "model-00001-of-00002.safetensors").write_text("a shard of the model before")
    with staged(folder, ModelError) as temporary:
        write(temporary, "new")
        assert not folder.exists() or (folder / "config.json").read_text() == "old"
    assert names(folder) == sorted([*FILES, *(["mine.txt"] if exists else [])])
    assert {(folder / name).read_text() for name in FILES} == {"new"}
    assert names(tmp_path) == [f"out/{name}" for name in names(folder)]


def test_a_failure_in_the_block_leaves_what_was_there(tmp_path):
    save(tmp_path / "out", "old")
    with pytest.raises(ZeroDivisionError), staged(tmp_path / "out", ModelError) as temporary:
        write(temporary, "new")
        raise ZeroDivisionError
    assert {(tmp_path / "out" / name).read_text() for name in FILES} == {"old"}
    assert len(names(tmp_path)) == len(FILES)


def _killed_save(folder: str, moment: int) -> None:
    left = [moment]

    def hook(event: str, arguments: tuple) -> None:
        if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "os.listdir"):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    save(Path(folder), "new")


@pytest.mark.parametrize("exists", [True, False])
def test_a_kill_at_any_moment_leaves_the_old_the_new_or_no_weights(tmp_path, exists):
    # Forked: a process of its own that has imported everything, killed at one file operation after the other.
    context = multiprocessing.get_context("fork")
    killed, partly = 0, 0
    for moment in range(1, MOMENTS):
        folder = tmp_path / str(moment) / "out"
        if exists:
            save(folder, "old")
        folder.parent.mkdir(exist_ok=True)
        process = context.Process(target=_killed_save, args=(str(folder), moment))
        process.start()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        if (folder / "model.safetensors").exists():
            marks = {(folder / name).read_text() for name in FILES}
            assert marks in ({"old"}, {"new"}), moment
        else:
            partly += 1
        # The next writer ends or removes what was left, and nothing else.
        (folder.parent / ".hf_mlx-tmp-of-mine").mkdir()
        tidy(folder.parent)
        tidy(folder)
        if folder.exists():
            assert {(folder / name).read_text() for name in FILES} in ({"old"}, {"new"}), moment
        assert [n for n in os.listdir(folder.parent) if n != "out"] == [".hf_mlx-tmp-of-mine"]
        save(folder, "newer")
        assert names(folder) == sorted(FILES)
        if process.exitcode == 0:
            break
    assert killed >= 15 and partly >= 1 and process.exitcode == 0


def test_a_living_writer_is_left_alone(tmp_path):
    with staged(tmp_path / "out", ModelError) as temporary:
        write(temporary, "new")
        tidy(tmp_path)
        check_output_dir(tmp_path)
        assert names(temporary) == sorted(FILES)
    assert names(tmp_path / "out") == sorted(FILES)


@pytest.fixture
def disk(tmp_path):
    """A file system of 64 KiB."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(path)]
    made = subprocess.run(command, capture_output=True, text=True) if sys.platform == "linux" else None
    if made is None or made.returncode:
        pytest.skip("a file system can only be mounted by root on Linux")
    yield path
    subprocess.run(["umount", str(path)], check=True)


WRITERS: dict[str, Any] = {
    "export": (lambda adapter, folder: export_adapter(adapter, folder, base="owner/name"), AdapterError),
    "merge": (merge_adapter, AdapterError),
}


@pytest.fixture
def adapter(tmp_path):
    return trained(make_llama(tmp_path / "base"), LoraPlan(r=64, target_modules="all-linear"))[1]


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("exists", [True, False])
def test_a_full_disk_is_named_and_nothing_is_half_written(adapter, disk, writer, exists):
    run, error = WRITERS[writer]
    if exists:
        (disk / "out").mkdir()
    with pytest.raises(error, match=r"out cannot be written: No space left on device") as full:
        run(adapter, disk / "out")
    assert "free some space" in full.value.remedy
    assert names(disk) == []


@pytest.mark.parametrize("writer", WRITERS)
def test_a_read_only_disk_is_named(adapter, disk, writer):
    run, error = WRITERS[writer]
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(error, match=r"out cannot be written: Read-only"):
        run(adapter, disk / "out")


@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_that_may_not_grow_is_named(adapter, tmp_path, writer):
    run, error = WRITERS[writer]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(error, match="out cannot be written"):
            run(adapter, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_what_a_library_says_of_a_full_disk_is_named_after_the_folder_asked_for(tmp_path):
    texts = ("[save_safetensors] Unable to write 5 bytes", "IO error: (os error 28)", "PytorchStreamWriter failed")
    for text in texts:
        with pytest.raises(CheckpointError) as full, saved_folder(tmp_path / "out"), staged(tmp_path / "x", ModelError):
            raise RuntimeError(text)
        assert f"{tmp_path / 'out'} cannot be written" in full.value.received
    assert list(tmp_path.iterdir()) == []


def test_a_fault_that_is_none_of_the_disk_comes_out_as_it_is(tmp_path):
    with pytest.raises(TypeError, match="a fault"), saved_folder(tmp_path / "out"):
        raise TypeError("a fault")


def _hold(folder: str, started: Any, end: Any) -> None:
    with held(folder):
        started.set()
        end.wait(60)


@pytest.fixture
def run_elsewhere(tmp_path):
    context = multiprocessing.get_context("fork")
    started, end = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(str(tmp_path), started, end))
    process.start()
    assert started.wait(60)
    yield process, end
    process.kill()
    process.join()


def test_a_second_run_is_told_of_the_first(tmp_path, run_elsewhere):
    process, end = run_elsewhere
    told = f"another run is under way: process {process.pid} on"
    with pytest.raises(CheckpointError, match=told) as refused, held(tmp_path):
        raise AssertionError("both are in")
    assert "output_dir=" in refused.value.remedy and (tmp_path / LOCK).exists()
    end.set()
    process.join()
    with held(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_killed_run_is_nobodys(tmp_path, run_elsewhere):
    process, _ = run_elsewhere
    process.kill()
    process.join()
    assert (tmp_path / LOCK).exists()
    with held(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b"\xff", b'{"pid": "x"}', b"5"])
def test_a_lock_file_that_says_nothing_is_no_obstacle(tmp_path, content):
    (tmp_path / LOCK).write_bytes(content)
    with held(tmp_path):
        pass


@pytest.mark.parametrize("thing", ["fifo", "folder", "link"])
def test_something_else_under_the_locks_name_is_named(tmp_path, thing):
    path = tmp_path / LOCK
    if thing == "fifo":
        os.mkfifo(path)
    elif thing == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(HFMLXError, match=r"hf_mlx\.lock"), held(tmp_path):
        pass
