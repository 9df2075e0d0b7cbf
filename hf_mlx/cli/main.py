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
from typing import Any

from hf_mlx import cli
from hf_mlx.errors import HFMLXError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The words after ``hf-mlx``; None reads ``sys.argv``.

    Returns:
        The exit status: 0, what the command returned, or 2 for a deliberate error, whose
        message goes to standard error.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    # The command alone where one is named: a script under `hf-mlx run` starts as soon as it does under python.
    arguments = build_parser(words[0] if words else None).parse_args(words)
    if getattr(arguments, "needs_mlx", True):
        from hf_mlx.backends import prepare_backend

        prepare_backend()
    try:
        return int(arguments.run(arguments) or 0)
    except HFMLXError as error:
        print(f"hf-mlx {arguments.command}: {type(error).__name__}\n  {error}", file=sys.stderr)
        return 2


class _Version(argparse.Action):
    """Looks the version up when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        from hf_mlx.version import describe_tested, installed_version

        print(f"hf-mlx {installed_version()} ({describe_tested()})")
        parser.exit()


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser with every command of this folder, in alphabetical order.

    Args:
        command: The one command to be parsed; None, or a name that is no command's, adds them all.
    """
    parser = argparse.ArgumentParser(prog="hf-mlx", description="Run Hugging Face fine-tuning scripts on MLX.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and leave")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    names = [found.name for found in pkgutil.iter_modules(cli.__path__)]
    for module in _command_modules([command] if command in names and command != "main" else sorted(names)):
        module.add_parser(subparsers)
    return parser


def _command_modules(names: Sequence[str | None]) -> Iterator[ModuleType]:
    for name in names:
        if name != "main":
            module = import_module(f"{cli.__name__}.{name}")
            if hasattr(module, "add_parser"):
                yield module


if __name__ == "__main__":
    sys.exit(main())
