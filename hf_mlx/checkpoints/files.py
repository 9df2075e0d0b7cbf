"""Writing folders so that a reader never sees half of one."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..atomic import sync
from ..errors import CheckpointError, HFMLXError

TEMPORARY = ".tmp-"
REPLACED = ".old-"
# What mlx, torch and tokenizers say when they cannot write; none of them raises an OSError.
_DISK_FULL = ("Unable to write", "No space left", "PytorchStreamWriter", "inline_container")
# Below this a write that failed is taken to have failed for want of room, whatever the writer called it.
_NO_ROOM = 1 << 20


def check_output_dir(folder: str | os.PathLike[str]) -> Path:
    """Make sure that ``folder`` exists and can be written, before hours of training depend on it.

    Raises:
        CheckpointError: It is a file, or cannot be created or written.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path, prefix=".write-test-"):
            pass
    except OSError as error:
        raise CheckpointError(
            f"output_dir={str(folder)!r} ({error.strerror or error})",
            "a folder that can be created and written",
            'SFTConfig(output_dir="runs/my-run", ...) with a folder you own',
        ) from error
    return path


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside ``path`` that takes its place once everything in it is on disk.

    Where ``path`` exists already it steps aside under another name for the moment between two renames;
    :func:`tidy` puts it back should the process die just there.

    Raises:
        CheckpointError: The disk is full or the folder cannot be written. What was there before stays.
    """
    temporary, old = path.with_name(TEMPORARY + path.name), path.with_name(REPLACED + path.name)
    with disk_errors(path):
        tidy(path.parent)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            _sync_tree(temporary)
            if path.exists():
                os.rename(path, old)
            os.rename(temporary, path)
            sync(path.parent)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException as error:
            full = isinstance(error, Exception) and _is_full(path.parent)
            shutil.rmtree(temporary, ignore_errors=True)
            _restore(old)
            if full and not isinstance(error, (OSError, HFMLXError)):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
            raise


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns what a full disk or a folder without permission raises into an error with a remedy.

    Raises:
        CheckpointError: The write failed.
    """
    try:
        yield
    except Exception as error:
        known = isinstance(error, OSError) or any(text in str(error) for text in _DISK_FULL)
        if isinstance(error, HFMLXError) or not known:
            raise
        reason = (error.strerror or error) if isinstance(error, OSError) else os.strerror(errno.ENOSPC)
        # What was asked for, not the temporary folder in its place.
        asked = path.with_name(path.name.removeprefix(TEMPORARY))
        raise CheckpointError(
            f"{asked} cannot be written: {reason} ({_room(path.parent)})",
            "a folder that can be written, with room for a checkpoint",
            "free some space, set save_total_limit=2 or choose another output_dir; then "
            "trainer.train(resume_from_checkpoint=True) goes on from the last complete checkpoint",
        ) from error


def tidy(folder: Path) -> None:
    """Remove what a killed process left half written in ``folder``; put back what it was about to replace."""
    for path in folder.glob(f"{REPLACED}checkpoint-*"):
        _restore(path)
    # Writers of adapters put a temporary folder of their own beside the one they are given.
    for pattern in (f"{TEMPORARY}checkpoint-*", f".{TEMPORARY}checkpoint-*"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    for root, _, files in os.walk(folder):
        for name in files:
            sync(Path(root, name))
        sync(Path(root))


def _restore(old: Path) -> None:
    path = old.with_name(old.name.removeprefix(REPLACED))
    if not old.exists():
        return
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(old, path)


def _is_full(folder: Path) -> bool:
    try:
        return shutil.disk_usage(folder).free < _NO_ROOM
    except OSError:
        return False


def _room(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 2**20:.0f} MiB free"
    except OSError:
        return "no such folder"
