"""The ``hf-mlx`` command: one subcommand for each module of this folder that defines ``add_parser``.

A command module defines ``add_parser(subparsers)``, which adds its parser and ends with
``parser.set_defaults(run=function)``. The function takes the parsed arguments and returns an exit
status or None. A command that never touches MLX also sets ``needs_mlx=False``.
"""

from __future__ import annotations

import argparse
import pkgutil
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from types import ModuleType

import hf_mlx
from hf_mlx import cli
from hf_mlx.blas import load_openblas
from hf_mlx.errors import HFMLXError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The words after ``hf-mlx``; None reads ``sys.argv``.

    Returns:
        The exit status: 0, what the command returned, or 2 for a deliberate error, whose
        message goes to standard error.
    """
    arguments = build_parser().parse_args(argv)
    if getattr(arguments, "needs_mlx", True):
        load_openblas()
    try:
        return int(arguments.run(arguments) or 0)
    except HFMLXError as error:
        print(f"hf-mlx {arguments.command}: {type(error).__name__}\n  {error}", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    """The parser with every command of this folder, in alphabetical order."""
    parser = argparse.ArgumentParser(prog="hf-mlx", description="Run Hugging Face fine-tuning scripts on MLX.")
    parser.add_argument(
        "--version", action="version", version=f"hf-mlx {hf_mlx.__version__}", help="print the version and leave"
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for module in _command_modules():
        module.add_parser(subparsers)
    return parser


def _command_modules() -> Iterator[ModuleType]:
    for found in sorted(pkgutil.iter_modules(cli.__path__), key=lambda found: found.name):
        if found.name != "main":
            module = import_module(f"{cli.__name__}.{found.name}")
            if hasattr(module, "add_parser"):
                yield module


if __name__ == "__main__":
    sys.exit(main())
