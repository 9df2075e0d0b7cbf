"""Who asks: the script, or a library that must not be told what the script is told."""

from __future__ import annotations

import functools
import os
import sys
import sysconfig
from types import FrameType


def is_library(frame: FrameType) -> bool:
    """Whether the code of ``frame`` is installed rather than the user's own."""
    # A script may be run from where a library is installed: trl/scripts/sft.py.
    return frame.f_globals.get("__name__") != "__main__" and frame.f_code.co_filename.startswith(_folders())


def script_imports() -> bool:
    """Whether the import that is under way was written in the script, and not in a library."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if not name.startswith(("importlib", "_frozen_importlib", __package__)):
            return not is_library(frame)
        frame = frame.f_back
    return False


@functools.cache
def _folders() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    folders = {paths[key] for key in ("purelib", "platlib", "stdlib", "platstdlib")}
    torch = getattr(sys.modules.get("torch"), "__file__", None)
    if torch:
        folders.add(os.path.dirname(os.path.dirname(torch)))
    return tuple(f"{folder}{os.sep}" for folder in folders)
