"""Files that appear whole or not at all."""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ..atomic import sync
from ..errors import AdapterError


def write_files(folder: str | Path, writers: Mapping[str, Callable[[Path], None]]) -> None:
    """Write several files into a folder, each complete and on disk before it takes its name.

    They are written to a temporary folder beside, synced, then renamed in the order given: the whole folder at
    once where ``folder`` does not exist yet, else file by file.

    Args:
        folder: Where they end up.
        writers: File name to a function that writes that file at the path it is given.

    Raises:
        AdapterError: The folder cannot be written.
    """
    folder = Path(folder).absolute()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise AdapterError(
            f"folder {folder}: {error.strerror or error}",
            "a folder that can be created and written",
            f'another place: trainer.save_model("{Path.home() / folder.name}")',
        ) from error
    try:
        for name, write in writers.items():
            write(temporary / name)
            sync(temporary / name)
        if folder.exists():
            for name in writers:
                os.replace(temporary / name, folder / name)
            sync(folder)
        else:
            # mkdtemp makes folders private; what is saved follows the user's umask like any other folder.
            temporary.chmod(0o777 & ~_umask())
            os.rename(temporary, folder)
            sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def new_folder(asked: str | Path, what: str) -> Iterator[Path]:
    """A folder to write into that becomes ``asked`` in one rename, once it is whole and on disk.

    What a killed process left of an earlier try is removed first; it never bears the name that was asked for.

    Args:
        asked: A folder that does not exist yet or is empty; links are followed.
        what: Named in the messages, e.g. ``"merge"``.

    Raises:
        AdapterError: ``asked`` holds something, or cannot be written.
    """
    folder = Path(asked).expanduser().resolve()
    check_vacant(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _tidy(folder, what)
        temporary = folder.with_name(f".{folder.name}.{what}-{os.getpid()}")
        temporary.mkdir()
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        yield temporary
        for path in temporary.iterdir():
            sync(path)
        sync(temporary)
        # Takes the place of an empty folder, and of nothing else.
        os.rename(temporary, folder)
        sync(folder.parent)
    except OSError as error:
        raise _unwritable(folder, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_vacant(folder: Path) -> None:
    """Raise unless ``folder`` does not exist yet or is empty.

    Raises:
        AdapterError: With what is there.
    """
    if not folder.exists() and not folder.is_symlink():
        return
    try:
        held = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else [f"{folder.name}, a file"]
    except OSError as error:
        raise _unwritable(folder, error) from error
    if held:
        more = f" and {len(held) - 1} more" if len(held) > 1 else ""
        raise AdapterError(
            f"folder {folder}, which holds {held[0]}{more}",
            "a folder that does not exist yet or is empty: what lies in it would be loaded together with the model",
            f'another place, for instance "{_vacant_name(folder)}"',
        )


def _vacant_name(folder: Path) -> Path:
    names = (folder.with_name(f"{folder.name or 'model'}-merged{n}") for n in ("", *range(2, 1000)))
    return next((path for path in names if not path.exists()), folder / "merged")


def _tidy(folder: Path, what: str) -> None:
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.{what}-*"):
        number = left.name.rpartition("-")[2]
        if number.isdigit() and not _runs(int(number)):
            shutil.rmtree(left, ignore_errors=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return process != os.getpid()


def _unwritable(folder: Path, error: OSError) -> AdapterError:
    return AdapterError(
        f"folder {folder}: {error.strerror or error}",
        "a folder that can be created and written, with room for it",
        f'another place, for instance "{Path.home() / (folder.name or "model")}"',
    )


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, line ends as given."""
    path.write_text(text, encoding="utf-8", newline="")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
