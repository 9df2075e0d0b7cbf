"""``hf-mlx sft``: the flags of ``trl sft``, trained by MLX; what it shares with the other commands of trl's."""

from __future__ import annotations

import argparse
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from ..errors import MissingDependency
from .run import add_flags, place_report


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command to ``hf-mlx``."""
    return add_trl_command(subparsers, "sft", "Supervised fine-tuning")


def add_trl_command(subparsers: Any, name: str, what: str) -> argparse.ArgumentParser:
    """Add a command that takes the flags of ``trl NAME``."""
    parser = subparsers.add_parser(
        name,
        help=f"fine-tune with the flags of `trl {name}`",
        description=f"{what} with the flags of `trl {name}` (--model_name_or_path, --dataset_name, "
        f"--use_peft, --config FILE, …), trained by MLX; `trl {name} --help` lists them.",
        allow_abbrev=False,
    )
    add_flags(parser)
    parser.set_defaults(run=partial(run, name), arguments=[])
    known = parser.parse_known_args

    def keep_the_rest(args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:
        # The flags are trl's to know: whatever is not ours is handed on.
        options, rest = known(args, namespace)
        options.arguments = rest
        return options, []

    parser.parse_known_args = keep_the_rest  # pyright: ignore[reportAttributeAccessIssue]
    return parser


def run(name: str, options: argparse.Namespace) -> int:
    """Train as ``trl NAME`` would."""
    if find_spec("trl") is None:
        received = f"hf-mlx {name} without trl installed"
        raise MissingDependency(received, "trl, which defines its flags", "pip install trl")
    from ..stand_in import install

    place_report(options)
    install(strict=options.strict, dry_run=options.dry_run)
    script = import_module(f"trl.scripts.{name}")
    parser = script.make_parser(prog=f"hf-mlx {name}")
    script.main(*parser.parse_args_and_config(args=options.arguments))
    return 0
