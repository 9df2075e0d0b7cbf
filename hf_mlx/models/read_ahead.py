"""Reading weight files in the background, while the dataset is prepared."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_CHUNK = 8 << 20  # bytes
# Files that fill more of the memory than this would push other things out of it, and each other.
_SHARE = 0.5


@contextmanager
def read_ahead(folder: Path) -> Iterator[None]:
    """Bring a folder's weight files into the system's page cache while the block runs, and no longer.

    The copy into MLX's own memory cannot run beside other work: MLX evaluates an array on the thread that made it
    (mlx 0.32: "There is no Stream(cpu, 0) in current thread"). What the disk costs can. Nothing is kept here but one
    chunk of 8 MiB; a file that cannot be read is left for loading to report.

    Args:
        folder: Holds ``model*.safetensors``; does nothing when they are more than half of the machine's memory.
    """
    files = sorted(file for file in folder.glob("model*.safetensors") if file.is_file())
    if not files or sum(file.stat().st_size for file in files) > _SHARE * _physical_memory():
        yield
        return
    stop = threading.Event()
    reader = threading.Thread(target=_read, args=(files, stop), name="hf_mlx-read-ahead", daemon=True)
    try:
        reader.start()
    except RuntimeError:
        # No thread to be had: loading reads the same files itself.
        reader = None
    try:
        yield
    finally:
        stop.set()
        if reader is not None:
            reader.join()


def _read(files: list[Path], stop: threading.Event) -> None:
    chunk = bytearray(_CHUNK)
    for file in files:
        try:
            with file.open("rb", buffering=0) as stream:
                while not stop.is_set() and stream.readinto(chunk):
                    pass
        except OSError:
            return


def _physical_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
