"""A checkpoint folder of rank 0 on machines that do not see it."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..processes.world import World

_CHUNK = 1 << 24
_WHAT = "a checkpoint that is handed on"


class SharedFolder:
    """``folder`` of rank 0 as every process can read it; :meth:`close` removes what was copied.

    Where all processes see the same files nothing is sent.

    Args:
        folder: On rank 0.
        world: The processes.

    Attributes:
        path: Where this process reads it.
    """

    def __init__(self, folder: Path, world: World) -> None:
        self._copy: tempfile.TemporaryDirectory | None = None
        self.path = folder
        listing = _list(folder) if folder.is_dir() else {}
        seen = world.gather_object(listing, _WHAT)
        if all(other == seen[0] for other in seen):
            return
        if listing != seen[0]:
            self._copy = tempfile.TemporaryDirectory(prefix="hf_mlx-")
            self.path = Path(self._copy.name, folder.name)
        for name in seen[0]:
            target = None
            if self._copy is not None:
                target = self.path / name
                target.parent.mkdir(parents=True, exist_ok=True)
            _hand_on(folder / name, target, world)

    def close(self) -> None:
        """Remove the copy, if there is one."""
        if self._copy is not None:
            self._copy.cleanup()


def _list(folder: Path) -> dict[str, Any]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): _digest(path) for path in files}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


def _hand_on(source: Path, target: Path | None, world: World) -> None:
    pieces = world.hand_on_bytes(_read(source) if world.is_main else iter(()), _WHAT)
    if target is None:
        for _ in pieces:
            pass
        return
    with target.open("wb") as file:
        for piece in pieces:
            file.write(piece)


def _read(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            yield piece
