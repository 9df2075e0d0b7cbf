"""The ``checkpoint-N`` folders of a run: their names, their order and how many are kept."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoint_path(output_dir: str | Path, step: int) -> Path:
    """Where the checkpoint of ``step`` belongs."""
    return Path(output_dir) / f"checkpoint-{step}"


def step_of(folder: Path) -> int | None:
    """The step in a folder's name, or None when it is not a checkpoint's name."""
    found = _NAME.fullmatch(folder.name)
    return int(found[1]) if found else None


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoint folders in ``output_dir``, the highest step last."""
    found = [(step_of(path), path) for path in Path(output_dir).glob("checkpoint-*") if path.is_dir()]
    return [path for _, path in sorted((step, path) for step, path in found if step is not None)]


def rotate(output_dir: str | Path, limit: int | None, *, keep: Iterable[str | Path]) -> None:
    """Delete the oldest checkpoints beyond ``limit``, as transformers 5.23 ``rotate_checkpoints`` does.

    Args:
        output_dir: Where they are.
        limit: ``save_total_limit``; None or 0 keeps all.
        keep: Never deleted, whatever the limit: the one just written and the best one.
    """
    if not limit or limit < 0:
        return
    protected = {Path(path).absolute() for path in keep}
    # By time, so that a higher step left by an earlier run of the same folder counts as old.
    folders = sorted(list_checkpoints(output_dir), key=lambda path: path.stat().st_mtime_ns)
    excess = len(folders) - max(limit, len(protected))
    for folder in [path for path in folders if path.absolute() not in protected][: max(excess, 0)]:
        # A name that no reader takes for a checkpoint first: a killed deletion must not leave half a folder.
        doomed = folder.rename(folder.with_name(f".tmp-{folder.name}"))
        shutil.rmtree(doomed, ignore_errors=True)
