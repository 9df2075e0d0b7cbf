"""Writing folders so that a reader never sees half of one."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .. import atomic
from ..atomic import is_full, staged, sync, sync_tree
from ..errors import CheckpointError, HFMLXError

TEMPORARY = ".tmp-"
REPLACED = ".old-"
_REMEDY = (
    "free some space, set save_total_limit=2 or choose another output_dir; then "
    "trainer.train(resume_from_checkpoint=True) goes on from the last complete checkpoint"
)


def check_output_dir(folder: str | os.PathLike[str]) -> Path:
    """Make sure that ``folder`` exists and can be written, before hours of training depend on it.

    Raises:
        CheckpointError: It is a file, or cannot be created or written.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        atomic.try_writing(path)
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
            sync_tree(temporary)
            if path.exists():
                os.rename(path, old)
            os.rename(temporary, path)
            sync(path.parent)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException as error:
            full = isinstance(error, Exception) and is_full(path.parent)
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
    # What was asked for, not the temporary folder in its place.
    with atomic.disk_errors(path.with_name(path.name.removeprefix(TEMPORARY)), CheckpointError, _REMEDY):
        yield


@contextmanager
def saved_folder(folder: str | Path) -> Iterator[Path]:
    """Where a model, its tokenizer and its card are written before they move into ``folder`` as a whole.

    Raises:
        CheckpointError: The disk is full or the folder cannot be written; it is as it was.
    """
    folder = Path(folder)
    asked = folder.with_name(folder.name.removeprefix(TEMPORARY))
    with atomic.disk_errors(asked, CheckpointError, _REMEDY), staged(folder, CheckpointError, _REMEDY) as temporary:
        card = folder / "README.md"
        if card.is_file():
            # PEFT extends the card that is there.
            shutil.copyfile(card, temporary / card.name)
        yield temporary


def tidy(folder: Path) -> None:
    """Remove what a killed process left half written in ``folder``; put back what it was about to replace."""
    for path in folder.glob(f"{REPLACED}checkpoint-*"):
        _restore(path)
    # Writers of adapters put a temporary folder of their own beside the one they are given.
    for pattern in (f"{TEMPORARY}checkpoint-*", f".{TEMPORARY}checkpoint-*"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def _restore(old: Path) -> None:
    path = old.with_name(old.name.removeprefix(REPLACED))
    if not old.exists():
        return
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(old, path)
