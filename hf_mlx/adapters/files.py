"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
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


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, line ends as given."""
    path.write_text(text, encoding="utf-8", newline="")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
