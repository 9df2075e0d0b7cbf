"""The list of what a checkpoint folder holds, written last: with it a reader proves that nothing is cut or edited."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from ..atomic import replaced
from ..version import installed_version

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
    content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
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
        recorded = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in recorded.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"
    for name, (size, digest) in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes where {size} were written"
        if _hash(path) != digest:
            return f"{name} is not what was written (its SHA-256 differs)"
    return None


def recorded_files(folder: Path) -> frozenset[str]:
    """The names in the manifest; none where there is no manifest."""
    path = folder / MANIFEST
    return frozenset(json.loads(path.read_text(encoding="utf-8"))["files"]) if path.is_file() else frozenset()


def _counts(path: Path) -> bool:
    return path.is_file() and path.name != MANIFEST


def _describe(path: Path) -> dict[str, int | str]:
    return {"size": path.stat().st_size, "sha256": _hash(path)}


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
