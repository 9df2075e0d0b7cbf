"""The version of this library, as installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def installed_version() -> str:
    """The distribution's version; ``0+source`` in a source tree that was never installed."""
    try:
        return version("hf-mlx")
    except PackageNotFoundError:
        return "0+source"
