"""The one door for files that somebody else wrote: regular files only, of a known size, JSON of a known shape.

A model, an adapter or a checkpoint comes from a download, a copy or a crashed machine. Whatever stands in a file's
place (a FIFO, a device, a link in a circle, a folder, ten gigabytes, JSON nested a million deep) is named with its
path and a remedy, in bounded time and memory, before any library that trusts it reads it.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .errors import HFMLXError

# Bytes. Configs take kilobytes; what lists every tensor or every log entry of a run takes a few megabytes.
SMALL, LARGE = 8 << 20, 128 << 20
# What any writer of these files nests is below 20.
MAX_DEPTH = 64
_MAX_NODES = 5_000_000
# transformers writes 10**30 for a tokenizer without a limit.
_MAX_DIGITS = 40
_KINDS = {
    stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a FIFO", stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device", stat.S_ISBLK: "a device",
}  # fmt: skip
_PLAIN: dict[type | None, str] = {
    dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a whole number",
    float: "a number", None: "null",
}  # fmt: skip

Types = type | None | tuple[type | None, ...]


def lies(path: Path) -> bool:
    """Whether anything has that name: a dangling link and a folder in a file's place as well."""
    return os.path.lexists(path)


@dataclass(frozen=True)
class Intake:
    """Reads the files of one kind of folder, and says what is wrong in that kind's own error.

    Attributes:
        error: Class of every error raised.
        remedy: How to get whole files of this kind.
    """

    error: type[HFMLXError]
    remedy: str

    @contextmanager
    def open(self, path: Path, limit: int | None = None) -> Iterator[tuple[BinaryIO, int]]:
        """Open a regular file for reading, with its size in bytes.

        Raises:
            HFMLXError: Of class :attr:`error`: not there, not a regular file, not readable, larger than ``limit``.
        """
        try:
            # Asked before it is opened: opening a device may already do something.
            self._check_kind(path, os.stat(path).st_mode)
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            raise self.refuse(path, _reason(path, error)) from error
        with os.fdopen(descriptor, "rb") as stream:
            found = os.fstat(descriptor)
            self._check_kind(path, found.st_mode)
            if limit is not None and found.st_size > limit:
                raise self.refuse(path, f"{found.st_size} bytes", f"at most {limit} bytes")
            try:
                yield stream, found.st_size
            except OSError as error:
                raise self.refuse(path, _reason(path, error)) from error

    def check(self, path: Path, limit: int | None = None) -> int:
        """The size of a regular file that can be read.

        Raises:
            HFMLXError: As :meth:`open`.
        """
        with self.open(path, limit) as (_, size):
            return size

    def read_bytes(self, path: Path, limit: int = SMALL) -> bytes:
        """The content of a regular file.

        Raises:
            HFMLXError: As :meth:`open`.
        """
        with self.open(path, limit) as (stream, _):
            content = stream.read(limit + 1)
        if len(content) > limit:
            raise self.refuse(path, "a file that grows while it is read", f"at most {limit} bytes")
        return content

    def read_text(self, path: Path, limit: int = SMALL) -> str:
        """The content of a UTF-8 file.

        Raises:
            HFMLXError: As :meth:`open`, or not UTF-8.
        """
        try:
            return self.read_bytes(path, limit).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.refuse(path, f"not UTF-8 text: {error}", "UTF-8 text") from error

    def read_json(
        self,
        path: Path,
        types: Mapping[str, Types] | None = None,
        *,
        limit: int = SMALL,
        finite: bool = False,
        largest: float | None = None,
    ) -> dict[str, Any]:
        """A JSON object.

        Args:
            path: The file.
            types: Types of the values under some keys, where they are there; ``None`` stands for null.
            limit: Largest size of the file, in bytes.
            finite: Whether NaN and infinite numbers are refused.
            largest: Numbers of this size and more are refused.

        Raises:
            HFMLXError: As :meth:`read_text`, or not a JSON object of a sane depth with values of these types.
        """
        content = self.parse(self.read_text(path, limit), path, finite=finite, largest=largest)
        self.check_types(content, types or {}, path)
        return content

    def parse(
        self, text: str | bytes, path: Path, *, part: str = "", finite: bool = False, largest: float | None = None
    ) -> dict[str, Any]:
        """A JSON object from text that ``path`` holds, ``part`` says where.

        Raises:
            HFMLXError: It is none, or nested deeper than 64.
        """
        try:
            content = json.loads(text)
        except RecursionError as error:
            raise self.refuse(
                path, f"{part}JSON nested deeper than {MAX_DEPTH}", "the JSON that its writer writes"
            ) from error
        except ValueError as error:
            raise self.refuse(path, f"{part}not readable as JSON ({error})", "a JSON object") from error
        if not isinstance(content, dict):
            raise self.refuse(path, f"{part}not a JSON object but {_name(content)}", "a JSON object")
        largest = largest or 10**_MAX_DIGITS
        if what := _strangeness(content, finite, largest):
            raise self.refuse(path, _place(content, finite, largest) + what, "the JSON that its writer writes")
        return content

    def check_types(self, content: Mapping[str, Any], types: Mapping[str, Types], path: Path) -> None:
        """Refuse a value of another type than a key's; true is no number here.

        Raises:
            HFMLXError: With the first key that is wrong.
        """
        for key, allowed in types.items():
            if key in content and not has_type(content[key], allowed):
                kinds = allowed if isinstance(allowed, tuple) else (allowed,)
                raise self.refuse(
                    path, f"{key}={show(content[key])}", f"{key}: {' or '.join(_PLAIN[kind] for kind in kinds)}"
                )

    @contextmanager
    def understood(self, path: Path, required: str, *, failed: str = "") -> Iterator[None]:
        """Turn whatever a library or our own code raises over the content of ``path`` into one named error.

        Args:
            path: The file or folder that is read.
            required: The rule it breaks.
            failed: What could not be done, in words.

        Raises:
            HFMLXError: Of class :attr:`error`; deliberate errors pass unchanged.
        """
        try:
            yield
        except (HFMLXError, KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:
            # Rust's panics (tokenizers) derive from BaseException.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            what = f"{failed} ({describe(error)})" if failed else describe(error)
            raise self.refuse(path, what, required) from error

    def refuse(self, path: Path, what: str, required: str = "a regular file that can be read") -> HFMLXError:
        """The error to raise over ``path``."""
        return self.error(f"{path}: {what}", required, self.remedy)

    def _check_kind(self, path: Path, mode: int) -> None:
        if not stat.S_ISREG(mode):
            kind = next((name for test, name in _KINDS.items() if test(mode)), "not a file")
            raise self.refuse(path, f"{kind} in place of a file")


def describe(error: BaseException) -> str:
    """Type and text of an error in one line of bounded length."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300] if text else type(error).__name__


def show(value: Any) -> str:
    """A value for a message, cut to a line."""
    text = f"{_name(value)} of {len(value)}" if isinstance(value, (dict, list)) and len(value) > 8 else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def has_type(value: Any, allowed: Types) -> bool:
    """Whether a JSON value is of one of these types; a whole number passes for a number, true for neither."""
    kinds = allowed if isinstance(allowed, tuple) else (allowed,)
    if value is None or isinstance(value, bool):
        return (None if value is None else bool) in kinds
    return any(kind is not None and isinstance(value, (int, float) if kind is float else kind) for kind in kinds)


def _name(value: Any) -> str:
    return _PLAIN.get(None if value is None else type(value), type(value).__name__)


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, FileNotFoundError) and path.is_symlink():
        return f"a link to {os.readlink(path)}, which is not there"
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def _place(content: Mapping[str, Any], finite: bool, largest: float) -> str:
    """The key and value that are strange, for a message; nothing where they lie deep."""
    for key, value in content.items():
        inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]
        if not any(isinstance(item, (dict, list)) for item in inner) and _strangeness(inner, finite, largest):
            return f"{key[:80]}={show(value)}: "
    return ""


def _strangeness(content: Any, finite: bool, largest: float) -> str | None:
    """What no writer of these files writes; walked without recursion."""
    level, depth, nodes = [content], 0, 0
    while level:
        depth, nodes = depth + 1, nodes + len(level)
        if depth > MAX_DEPTH:
            return f"JSON nested deeper than {MAX_DEPTH}"
        if nodes > _MAX_NODES:
            return f"JSON of more than {_MAX_NODES} values"
        following = []
        for item in level:
            if isinstance(item, dict):
                following.extend(item.values())
            elif isinstance(item, list):
                following.extend(item)
            elif isinstance(item, float) and not math.isfinite(item):
                if finite:
                    return f"the number {item}"
            elif isinstance(item, (int, float)) and abs(item) >= largest:
                return f"a number of the size {largest:g} or more"
        level = following
    return None
