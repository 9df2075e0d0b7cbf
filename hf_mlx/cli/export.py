"""``hf-mlx export``: a trained adapter or checkpoint, proven and written where another program takes it."""

from __future__ import annotations

import argparse

from ..errors import SettingError

FORMATS = ("peft", "mlx-lm", "gguf")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the ``export`` command."""
    parser = subparsers.add_parser(
        "export",
        help="write an adapter (or a checkpoint's) for PEFT, mlx-lm or llama.cpp",
        description="Check an adapter against its base and write it for another program. peft: the folder that "
        "PeftModel.from_pretrained loads; mlx-lm: the folder that mlx_lm.generate --adapter-path loads; gguf: the "
        "file that llama.cpp's --lora and Ollama's ADAPTER take, or, of a folder with a whole model, the model. "
        "Adapters of PEFT and of mlx-lm are read.",
    )
    parser.add_argument(
        "adapter", help="folder with adapter_config.json, for instance a checkpoint; for gguf a whole model's too"
    )
    parser.add_argument("output", help="folder to write, or for gguf the file")
    parser.add_argument("--format", choices=FORMATS, default="peft", help="what to write (default: %(default)s)")
    parser.add_argument("--base", help="folder or hub id of the base (default: the one in adapter_config.json)")
    parser.add_argument("--base-name", help="name to record as the base's (default: the base given)")
    parser.add_argument("--revision", help="revision of the base to record (peft only)")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    from ..adapters.export import export_adapter
    from ..adapters.gguf_file import write_gguf
    from ..adapters.gguf_model import is_model_folder, write_gguf_model
    from ..adapters.mlx_lm_folder import write_mlx_lm
    from ..adapters.read import import_adapter, recorded_base

    if arguments.revision and arguments.format != "peft":
        raise SettingError(
            f"--revision {arguments.revision} with --format {arguments.format}",
            "--format peft: the other formats record no revision",
            f"hf-mlx export {arguments.adapter} {arguments.output} --format {arguments.format}",
        )
    if arguments.format == "gguf" and is_model_folder(arguments.adapter):
        write_gguf_model(arguments.adapter, arguments.output, name=arguments.base_name)
        print(f"wrote {arguments.output}: the model in {arguments.adapter}")
        return
    base = arguments.base or recorded_base(arguments.adapter)
    adapter = import_adapter(arguments.adapter, base)
    name = arguments.base_name or base
    if arguments.format == "mlx-lm":
        write_mlx_lm(adapter, arguments.output, base=name)
    elif arguments.format == "gguf":
        write_gguf(adapter, arguments.output, base=name)
    else:
        export_adapter(adapter, arguments.output, base=name, revision=arguments.revision)
    print(f"wrote {arguments.output}: {len(adapter.targets)} adapted modules of {name}")
