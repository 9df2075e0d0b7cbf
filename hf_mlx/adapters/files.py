"""Files that appear whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from ..atomic import staged
from ..errors import AdapterError


def write_files(folder: str | Path, writers: Mapping[str, Callable[[Path], None]]) -> None:
    """Write several files into a folder, each complete and on disk before it takes its name.

    The whole folder appears at once where ``folder`` does not exist yet; see :func:`hf_mlx.atomic.staged`.

    Args:
        folder: Where they end up.
        writers: File name to a function that writes that file at the path it is given.

    Raises:
        AdapterError: The folder cannot be written.
    """
    with staged(folder, AdapterError) as temporary:
        for name, write in writers.items():
            write(temporary / name)


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


def _unwritable(folder: Path, error: OSError) -> AdapterError:
    return AdapterError(
        f"folder {folder}: {error.strerror or error}",
        "a folder that can be created and written, with room for it",
        f'another place, for instance "{Path.home() / (folder.name or "model")}"',
    )


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, line ends as given."""
    path.write_text(text, encoding="utf-8", newline="")
