"""``hf-mlx sft``: the flags of ``trl sft``, trained by MLX."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from typing import Any

from ..errors import MissingDependency
from .run import add_flags


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command to ``hf-mlx``."""
    parser = subparsers.add_parser(
        "sft",
        help="fine-tune with the flags of `trl sft`",
        description="Supervised fine-tuning with the flags of `trl sft` (--model_name_or_path, --dataset_name, "
        "--use_peft, --config FILE, …), trained by MLX; `trl sft --help` lists them.",
        allow_abbrev=False,
    )
    add_flags(parser)
    parser.set_defaults(run=run, arguments=[])
    known = parser.parse_known_args

    def keep_the_rest(args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:
        # The flags are trl's to know: whatever is not ours is handed on.
        options, rest = known(args, namespace)
        options.arguments = rest
        return options, []

    parser.parse_known_args = keep_the_rest  # pyright: ignore[reportAttributeAccessIssue]
    return parser


def run(options: argparse.Namespace) -> int:
    """Train as ``trl sft`` would."""
    if find_spec("trl") is None:
        raise MissingDependency("hf-mlx sft without trl installed", "trl, which defines its flags", "pip install trl")
    from ..stand_in import install

    install(strict=options.strict, dry_run=options.dry_run)
    from trl.scripts.sft import main, make_parser

    parser = make_parser(prog="hf-mlx sft")
    script, training, model, dataset = parser.parse_args_and_config(args=options.arguments)
    main(script, training, model, dataset)
    return 0
