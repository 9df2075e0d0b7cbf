"""``hf-mlx export``: a trained adapter or checkpoint, proven and written as a clean PEFT folder."""

from __future__ import annotations

import argparse


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the ``export`` command."""
    parser = subparsers.add_parser(
        "export",
        help="write an adapter (or a checkpoint's) as a PEFT folder",
        description="Check an adapter against its base and write it as PEFT would, with the base's name in it.",
    )
    parser.add_argument("adapter", help="folder with adapter_config.json, for instance a checkpoint")
    parser.add_argument("output", help="folder to write")
    parser.add_argument("--base", help="folder or hub id of the base (default: the one in adapter_config.json)")
    parser.add_argument("--base-name", help="name to record as base_model_name_or_path (default: the base given)")
    parser.add_argument("--revision", help="revision of the base to record")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    from ..adapters.export import export_adapter
    from ..adapters.read import import_adapter, recorded_base

    base = arguments.base or recorded_base(arguments.adapter)
    adapter = import_adapter(arguments.adapter, base)
    name = arguments.base_name or base
    export_adapter(adapter, arguments.output, base=name, revision=arguments.revision)
    print(f"wrote {arguments.output}: {len(adapter.targets)} adapted modules of {name}")
