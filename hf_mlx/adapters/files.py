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


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, line ends as given."""
    path.write_text(text, encoding="utf-8", newline="")
