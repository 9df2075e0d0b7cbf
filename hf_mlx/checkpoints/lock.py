"""One run at a time in an output_dir: the second is told so by name."""

from __future__ import annotations

import functools
import json
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

from ..errors import CheckpointError
from ..intake import Intake
from ..locks import host, is_at, runs, try_lock
from ..processes.world import the_world

LOCK = ".hf_mlx.lock"
_FILES = Intake(CheckpointError, "delete that file; it only says which run is in the folder")
_Method = TypeVar("_Method", bound=Callable[..., Any])


@contextmanager
def held(folder: str | Path) -> Iterator[None]:
    """Be the one run in ``folder`` while the block lasts.

    The system lets go of a lock when its process ends, however it ends, so a lock that can be taken is nobody's.
    Where a file system has no locks, the process named in the file tells.

    Raises:
        CheckpointError: Another run is in it, named by its process, machine and time.
    """
    descriptor = _acquire(Path(folder))
    try:
        yield
    finally:
        if descriptor is not None:
            # Before it is let go of: afterwards the name may be another run's.
            Path(folder, LOCK).unlink(missing_ok=True)
            os.close(descriptor)


def alone_in_output_dir(method: _Method) -> _Method:
    """A trainer's method that runs with its ``args.output_dir`` :func:`held`, by the first of several processes."""

    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        with held(self.args.output_dir) if the_world().is_main else nullcontext():
            return method(self, *args, **kwargs)

    return wrapped  # pyright: ignore[reportReturnType]


def _acquire(folder: Path) -> int | None:
    path = folder / LOCK
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
        except OSError:
            if path.exists() or path.is_symlink():
                _FILES.check(path)
            # A folder that nothing can be written into is safe from a second writer.
            return None
        try:
            locked = try_lock(descriptor)
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                _FILES.check(path)
            owner = _read(descriptor)
            if locked is False or (locked is None and _lives(owner)):
                raise _in_use(folder, owner)
            if is_at(path, descriptor):
                _write(descriptor)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        # Its run ended between the two: the name is gone, or another run's.
        os.close(descriptor)


def _read(descriptor: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(descriptor: int) -> None:
    content = {"pid": os.getpid(), "host": host(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(content).encode(), 0)
    except OSError:
        # A full disk: the lock holds without a name.
        return


def _lives(owner: dict[str, Any]) -> bool:
    process = owner.get("pid")
    if not isinstance(process, int) or process <= 0:
        return False
    return owner.get("host") != host() or runs(process)


def _in_use(folder: Path, owner: dict[str, Any]) -> CheckpointError:
    who = f"process {owner.get('pid', 'unknown')} on {owner.get('host', 'this machine')}"
    since = f" since {owner['since']}" if isinstance(owner.get("since"), str) else ""
    return CheckpointError(
        f"output_dir={str(folder)!r}, in which another run is under way: {who}{since}",
        "one run at a time in an output_dir: two would overwrite and delete each other's checkpoints",
        f"SFTConfig(output_dir={str(folder.with_name(folder.name + '-2'))!r}, ...), or wait until that run has ended",
    )
