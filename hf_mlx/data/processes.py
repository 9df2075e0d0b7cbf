"""Processes that prepare rows, and what to say where the system does not give any."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import DataError


@contextmanager
def naming_processes(count: int | None, name: str) -> Iterator[None]:
    """Where ``dataset_num_proc`` processes are started.

    Args:
        count: ``dataset_num_proc``; None starts none.
        name: Of the dataset.

    Raises:
        DataError: The system has no process or thread to give.
    """
    try:
        yield
    except (BlockingIOError, RuntimeError) as error:
        if not count or not (isinstance(error, BlockingIOError) or "start new thread" in str(error)):
            raise
        raise DataError(
            f"dataset_num_proc={count} for the {name} dataset, and no process to start ({error})",
            "as many processes as dataset_num_proc asks for",
            "SFTConfig(dataset_num_proc=None) prepares in this one; or raise the system's limit: ulimit -u 4096",
        ) from error
