"""Locks that a process holds for as long as it lives, and who that is."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
from pathlib import Path

_NO_LOCKS = (errno.ENOTSUP, errno.EINVAL, errno.ENOLCK, errno.EBADF, errno.ENOSYS)


def try_lock(descriptor: int) -> bool | None:
    """Lock an open file for as long as it is open; None where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as error:
        return None if error.errno in _NO_LOCKS else False


def is_at(path: Path, descriptor: int) -> bool:
    """Whether an open file still bears that name: another process may have taken it away meanwhile."""
    try:
        found, held = os.lstat(path), os.fstat(descriptor)
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == (held.st_dev, held.st_ino)


def runs(process: int) -> bool:
    """Whether a process of this machine is there."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass
    return True


def host() -> str:
    """This machine's name, as a part of a file's name."""
    return re.sub(r"[^\w-]", "-", socket.gethostname())
