"""``hf-mlx verify``: PEFT's logits against ours."""

from __future__ import annotations

import argparse


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the ``verify`` command."""
    parser = subparsers.add_parser(
        "verify",
        help="load an adapter in PEFT and compare its logits with MLX",
        description="Load an adapter here and in PEFT (torch, fp32), compare logits and write verification.json.",
    )
    parser.add_argument("adapter", help="folder with adapter_config.json")
    parser.add_argument("--base", help="folder or hub id of the base (default: the one in adapter_config.json)")
    parser.add_argument("--prompt", action="append", help="text to compare on; may be repeated (default: four texts)")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from ..adapters.verify import verify_adapter

    report = verify_adapter(arguments.adapter, arguments.base, prompts=arguments.prompt)
    return 0 if report.ok else 1
