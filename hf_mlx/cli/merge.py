"""``hf-mlx merge``: base plus adapter as one Hugging Face model folder."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the ``merge`` command."""
    parser = subparsers.add_parser(
        "merge",
        help="fold an adapter into its base and write a Hugging Face model",
        description="Write base plus adapter as a folder that AutoModelForCausalLM and mlx-lm load, under Hugging Face "
        "names, or as one GGUF file where OUTPUT ends in .gguf.",
    )
    parser.add_argument("adapter", help="folder with adapter_config.json")
    parser.add_argument("output", help="folder to write, new or empty; or a file *.gguf for llama.cpp")
    parser.add_argument("--base", help="folder or hub id of the base (default: the one in adapter_config.json)")
    parser.add_argument("--dequantize", action="store_true", help="write a quantised base in floating point")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    from ..adapters.files import check_vacant
    from ..adapters.gguf_model import write_gguf_model
    from ..adapters.merge import merge_adapter
    from ..adapters.read import import_adapter, recorded_base

    base = arguments.base or recorded_base(arguments.adapter)
    output = Path(arguments.output).expanduser()
    as_file = output.suffix == ".gguf"
    if not as_file:
        # Before gigabytes are read.
        check_vacant(output)
    adapter = import_adapter(arguments.adapter, base)
    if as_file:
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=".hf_mlx-merge-") as scratch:
            merge_adapter(adapter, Path(scratch) / "model", dequantize=arguments.dequantize)
            write_gguf_model(Path(scratch) / "model", output, name=output.stem)
    else:
        merge_adapter(adapter, output, dequantize=arguments.dequantize)
    print(f"wrote {arguments.output}: {base} with {len(adapter.targets)} modules merged")
