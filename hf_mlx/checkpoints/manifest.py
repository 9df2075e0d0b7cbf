"""The list of what a checkpoint folder holds, written last: with it a reader proves that nothing is cut or edited."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ..atomic import replaced
from ..intake import LARGE, has_type, lies, show
from ..version import installed_version
from .damage import FILES, DamagedCheckpoint

MANIFEST = "hf_mlx_manifest.json"


def write_manifest(folder: Path) -> None:
    """Record the size and SHA-256 of every file in ``folder``."""
    files = {
        path.relative_to(folder).as_posix(): _describe(path) for path in sorted(folder.rglob("*")) if _counts(path)
    }
    content = {"written_by": f"hf_mlx {installed_version()}", "files": files}
    (folder / MANIFEST).write_text(json.dumps(content, indent=1), encoding="utf-8")


def extend_manifest(folder: Path) -> None:
    """Also record the files that came since, from a callback's ``on_save`` for instance; edited ones stay damage."""
    content = _read(folder)
    names = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if _counts(path)}
    added = {name: _describe(path) for name, path in names.items() if name not in content["files"]}
    if added:
        content["files"] |= added
        with replaced(folder / MANIFEST) as temporary:
            temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")


def find_damage(folder: Path) -> str | None:
    """What differs from the manifest, in words; None when nothing does.

    Files that came later, from a user's callback for instance, are not damage.
    """
    try:
        recorded = _read(folder)["files"]
    except DamagedCheckpoint as error:
        return error.received.removeprefix(f"{folder}/")
    for name, entry in recorded.items():
        path, size = folder / name, entry["size"]
        try:
            found = FILES.check(path)
            if found != size:
                return f"{name} has {found} bytes where {size} were written"
            if _hash(path) != entry["sha256"]:
                return f"{name} is not what was written (its SHA-256 differs)"
        except DamagedCheckpoint as error:
            return error.received.removeprefix(f"{folder}/") if lies(path) else f"{name} is missing"
    return None


def recorded_files(folder: Path) -> frozenset[str]:
    """The names in the manifest; none where there is no manifest."""
    return frozenset(_read(folder)["files"]) if lies(folder / MANIFEST) else frozenset()


def _read(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    content = FILES.read_json(path, limit=LARGE)
    files = content.get("files")
    entries = files.items() if isinstance(files, dict) else [("files", None)]
    for name, entry in entries:
        whole = isinstance(entry, dict) and has_type(entry.get("size"), int) and has_type(entry.get("sha256"), str)
        # A name that leads out of the folder is no part of it.
        if not whole or Path(name).is_absolute() or ".." in Path(name).parts:
            raise FILES.refuse(path, f"{name}: {show(entry)}", "size and sha256 of every file")
    return content


def _counts(path: Path) -> bool:
    return path.is_file() and path.name != MANIFEST


def _describe(path: Path) -> dict[str, int | str]:
    return {"size": path.stat().st_size, "sha256": _hash(path)}


def _hash(path: Path) -> str:
    with FILES.open(path) as (file, _):
        return hashlib.file_digest(file, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]
