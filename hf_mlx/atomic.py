"""Files and folders that a reader never sees half of, whatever a full disk, a kill or a second process does.

What is being written lies in a folder of its own, ``.hf_mlx-tmp-…``, that its writer holds a lock on. Once all of it is
on disk it takes its place. A lock that nobody holds belongs to a process that died: the next writer removes what is
half written, and ends what was whole and only had to be moved. Nothing that bears another name is ever touched.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import HFMLXError
from .locks import host, is_at, runs, try_lock

TEMPORARY = ".hf_mlx-tmp-"
_PLAN = ".plan.json"
_NAME = re.compile(re.escape(TEMPORARY) + r"(?P<host>[\w.-]*)\.(?P<process>\d+)\.[0-9a-f]{8}")
# A folder without one of these is not taken for a model or an adapter, so they go first and come last.
_WEIGHTS = re.compile(r"(adapter_)?model(-\d+-of-\d+)?\.(safetensors|bin)|model\.safetensors\.index\.json")
_MODEL = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")
# What mlx, torch, safetensors and tokenizers say when they cannot write; none of them raises an OSError.
_DISK_FULL = re.compile(
    r"Unable to write|No space left|PytorchStreamWriter|inline_container|File too large|\(os error (27|28|30|122)\)"
)
# Below this a write that failed is taken to have failed for want of room, whatever the writer called it.
_NO_ROOM = 1 << 20
_MARK = "disk_failure"


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place once it is complete and on disk."""
    temporary = path.with_name(f".{path.stem}.tmp{os.getpid()}{path.suffix}")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def staged(folder: str | Path, error: type[HFMLXError], remedy: str | None = None) -> Iterator[Path]:
    """An empty folder whose files move into ``folder`` once all of them are on disk.

    Where ``folder`` does not exist, it appears whole, in one rename. Where it does, files of other names stay, but
    for the shards of a model that is replaced. Its old weights go before the first new file comes and the new ones
    come last: killed in between, it holds no weights, and the next writer (or :func:`tidy`) ends the move.

    Args:
        folder: Where the files end up; made with its parents.
        error: Class of what is raised when the disk is full or cannot be written.
        remedy: What to do about it then.

    Raises:
        HFMLXError: Of class ``error``. ``folder`` is as it was.
    """
    folder = Path(folder).expanduser().absolute()
    with disk_errors(folder, error, remedy):
        place = folder
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            place = folder.parent
            if os.path.lexists(folder):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        tidy(place)
        temporary, lock = _claim(place)
        try:
            yield temporary
            sync_tree(temporary)
            if place is folder or not _take_name(temporary, folder):
                _move_into(temporary, folder, error)
        except Exception as failure:
            if is_full(place) and not isinstance(failure, (OSError, HFMLXError)):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from failure
            raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            os.close(lock)


@contextmanager
def disk_errors(path: Path, error: type[HFMLXError], remedy: str | None = None) -> Iterator[None]:
    """Turns what a full disk or a folder without permission raises into an error with a remedy.

    Args:
        path: What is written.
        error: Class of what is raised.
        remedy: What to do about it.

    Raises:
        HFMLXError: Of class ``error``: the write failed.
    """
    try:
        yield
    except Exception as failure:
        reason = _reason(failure)
        if reason is None:
            raise
        named = error(
            f"{path} cannot be written: {reason} ({_room(path.parent)})",
            "a folder that can be created and written, with room for what goes into it",
            remedy or f"free some space, or choose another place, for instance {str(Path.home() / path.name)!r}",
        )
        # Where one writer calls another, the outermost knows what was asked for.
        vars(named)[_MARK] = reason
        raise named from failure


def try_writing(place: Path) -> None:
    """Find out whether a folder can be written into; also tidies it.

    Raises:
        OSError: It cannot.
    """
    tidy(place)
    temporary, lock = _claim(place)
    shutil.rmtree(temporary, ignore_errors=True)
    os.close(lock)


def tidy(place: Path) -> None:
    """Remove what processes that died left half written in ``place``, and end what they had begun to move."""
    try:
        left = [path for path in place.iterdir() if path.name.startswith(TEMPORARY)]
    except OSError:
        return
    for path in left:
        if path.is_symlink() or not path.is_dir() or not _NAME.fullmatch(path.name):
            continue
        lock = _lock(path)
        if lock is None:
            continue
        try:
            if (path / _PLAN).is_file():
                _carry_out(path, place)
            shutil.rmtree(path, ignore_errors=True)
        except (OSError, ValueError, KeyError, TypeError):
            # It stays: it may hold the only copy of what was to be moved.
            continue
        finally:
            os.close(lock)


def sync(path: Path) -> None:
    """Wait until a file or a folder's list of names is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Wait until everything in a folder is on disk."""
    for root, _, files in os.walk(folder):
        for name in files:
            sync(Path(root, name))
        sync(Path(root))


def _claim(place: Path) -> tuple[Path, int]:
    """A new temporary folder, and the lock on it."""
    while True:
        path = place / f"{TEMPORARY}{host()}.{os.getpid()}.{secrets.token_hex(4)}"
        path.mkdir()
        descriptor = os.open(path, os.O_RDONLY)
        # Between the two lines another process may have taken it for a dead one's.
        if try_lock(descriptor) is not False and is_at(path, descriptor):
            return path, descriptor
        os.close(descriptor)


def _lock(path: Path) -> int | None:
    """The lock on a temporary folder whose writer is dead, else None."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    locked = try_lock(descriptor)
    if locked is None:
        owner = _NAME.fullmatch(path.name)
        locked = owner is not None and owner["host"] == host() and not runs(int(owner["process"]))
    if locked:
        return descriptor
    os.close(descriptor)
    return None


def _take_name(temporary: Path, folder: Path) -> bool:
    mask = os.umask(0)
    os.umask(mask)
    temporary.chmod(0o777 & ~mask)
    try:
        os.rename(temporary, folder)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            # Somebody made it meanwhile.
            return False
        raise
    sync(folder.parent)
    return True


def _move_into(temporary: Path, folder: Path, error: type[HFMLXError]) -> None:
    if temporary.parent != folder:
        with staged(folder, error) as inside:
            for path in temporary.iterdir():
                os.rename(path, inside / path.name)
        return
    names = [path.relative_to(temporary).as_posix() for path in sorted(temporary.rglob("*")) if not path.is_dir()]
    names.sort(key=lambda name: bool(_WEIGHTS.fullmatch(name)))
    stale = []
    if any(_MODEL.fullmatch(name) for name in names):
        # As transformers 5.23 save_pretrained: shards of the model that was there before would be loaded along.
        stale = [path.name for path in folder.iterdir() if _MODEL.fullmatch(path.name) and path.name not in names]
    with replaced(temporary / _PLAN) as path:
        path.write_text(json.dumps({"move": names, "remove": stale}), encoding="utf-8")
    sync(temporary)
    _carry_out(temporary, folder)


def _carry_out(temporary: Path, folder: Path) -> None:
    """Do what the plan in ``temporary`` says, from wherever it was left off."""
    plan = json.loads((temporary / _PLAN).read_text(encoding="utf-8"))
    left = [name for name in plan["move"] if os.path.lexists(temporary / name)]
    if len(left) > 1:
        for name in plan["remove"] + [name for name in left if _WEIGHTS.fullmatch(name)]:
            (folder / name).unlink(missing_ok=True)
    for name in left:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary / name, folder / name)
    for name in plan["remove"]:
        (folder / name).unlink(missing_ok=True)
    sync(folder)


def _reason(failure: Exception) -> str | None:
    """Why nothing could be written, or None when that is not what happened."""
    if isinstance(failure, HFMLXError):
        return vars(failure).get(_MARK)
    if isinstance(failure, OSError):
        return failure.strerror or str(failure)
    found = _DISK_FULL.search(str(failure))
    if found is None:
        return None
    code = int(found[1]) if found[1] else errno.EFBIG if found[0] == "File too large" else errno.ENOSPC
    return os.strerror(code)


def is_full(folder: Path) -> bool:
    """Whether a write that failed is to be taken for one without room, whatever the writer called it."""
    try:
        return shutil.disk_usage(folder).free < _NO_ROOM
    except OSError:
        return False


def _room(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 2**20:.0f} MiB free"
    except OSError:
        return "no such folder"
