"""torch's files, proven before torch reads them: no code, no compressed members, no more values than bytes."""

from __future__ import annotations

import zipfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from ..intake import MAX_DEPTH, Intake

_ZIP = b"PK\x03\x04"
# Dicts, lists and tensors: a full fine-tune's optimizer of a thousand parameters holds some five thousand.
_MAX_NODES = 2_000_000
# How often the same bytes may be held: tied weights are stored once.
_SHARED = 8


def load_pickle(path: Path, files: Intake, *, allowed: AbstractContextManager[Any] | None = None) -> Any:
    """``torch.load(weights_only=True)`` of a file that was checked before, its content checked afterwards.

    Args:
        path: The file, as ``torch.save`` writes it: a zip archive, or before torch 1.6 a bare pickle.
        files: Whose errors to raise.
        allowed: A context that allows further types to be unpickled.

    Raises:
        HFMLXError: It is no regular file, an archive that :func:`check_archive` refuses, or holds more than it may.
        Exception: Whatever torch raises over a broken or hostile pickle.
    """
    import torch

    with files.open(path) as (stream, size):
        archive = stream.read(4) == _ZIP
    if archive:
        check_archive(path, files)
    with allowed or nullcontext():
        held = torch.load(path, map_location="cpu", weights_only=True)
    if what := _excess(held, size):
        raise files.refuse(path, what, "tensors with the bytes that they are stored in")
    return held


def check_archive(path: Path, files: Intake) -> None:
    """Prove the members of a torch file, a zip archive, against their sizes and checksums; torch looks at neither.

    Raises:
        HFMLXError: It is no archive, a member is compressed (torch never does that; a small file could become a huge
            one), takes more than the file has, or does not match its checksum.
    """
    required = "a complete file that torch.save wrote"
    with files.open(path) as (stream, size), files.understood(path, required), zipfile.ZipFile(stream) as archive:
        members = archive.infolist()
        squeezed = [m.filename for m in members if m.compress_type != zipfile.ZIP_STORED or m.flag_bits & 1]
        if squeezed:
            raise files.refuse(path, f"{squeezed[0]!r} is compressed or encrypted", required)
        if sum(member.file_size for member in members) > size:
            raise files.refuse(path, f"members larger than the file of {size} bytes", required)
        wrong = archive.testzip()
        if wrong is not None:
            raise files.refuse(path, f"{wrong} does not match its checksum", required)


def _excess(content: Any, size: int) -> str | None:
    """What could not have come out of a file of ``size`` bytes; walked without recursion, links counted each time."""
    import torch

    level, depth, nodes, held = [content], 0, 1, 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            return f"values nested deeper than {MAX_DEPTH}"
        following: list[Any] = []
        for item in level:
            if isinstance(item, torch.Tensor):
                held += item.numel() * item.element_size()
                if held > _SHARED * size:
                    return f"tensors of {held} bytes and more in a file of {size}, one of shape {tuple(item.shape)}"
            elif isinstance(item, (dict, list, tuple, set)):
                nodes += len(item)
                if nodes > _MAX_NODES:
                    return f"more than {_MAX_NODES} values"
                following.extend(item.values() if isinstance(item, dict) else item)
        level = following
    return None
