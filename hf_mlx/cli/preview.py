"""``hf-mlx preview``: a few training rows, trained tokens in colour and masked ones dim."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import DataError, ModelError
from ..settings.config_tables import DPO_TABLE, LM_TABLE, REWARD_TABLE, SFT_TABLE
from .explain import read_settings

_TABLES = {"SFTTrainer": SFT_TABLE, "DPOTrainer": DPO_TABLE, "RewardTrainer": REWARD_TABLE, "Trainer": LM_TABLE}
_READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command to ``hf-mlx``."""
    parser = subparsers.add_parser(
        "preview",
        help="show a few rows as they will be trained on",
        description="Prepare a dataset as the trainer does and print a few rows: tokens that train in colour, masked "
        "ones dim.",
    )
    parser.add_argument(
        "dataset", metavar="DATASET", help="a json, jsonl, csv, parquet or txt file, or a dataset's folder or hub name"
    )
    parser.add_argument("--model", required=True, help="the model's folder or hub name, for its tokenizer")
    parser.add_argument("--trainer", choices=_TABLES, default="SFTTrainer", help="whose rows they are (SFTTrainer)")
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="JSON or YAML: the fields of that trainer's configuration"
    )
    parser.add_argument("--split", default="train", help="the split to read (train)")
    parser.add_argument("--rows", type=int, default=3, help="how many rows to show (3)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write the rows as one HTML file")
    parser.set_defaults(run=run, needs_mlx=False)
    return parser


def run(options: argparse.Namespace) -> int:
    """Show the rows; returns the exit status."""
    from ..data.preview import preview, preview_pairs, preview_scored, preview_tokens
    from ..settings.resolve import resolve_plan

    args, peft_config, notes = read_settings(options.config) if options.config else ({}, None, [])
    for note in notes:
        print(note)
    plan, _ = resolve_plan(args, peft_config, table=_TABLES[options.trainer])
    dataset, tokenizer = load_rows(options.dataset, options.split), load_tokenizer(options.model)
    if options.trainer == "Trainer":
        preview_tokens(dataset, tokenizer, rows=options.rows, html=options.html)
    else:
        show = {"DPOTrainer": preview_pairs, "RewardTrainer": preview_scored}.get(options.trainer, preview)
        show(dataset, tokenizer, plan.data, rows=options.rows, html=options.html)
    if options.html:
        print(f"\nwrote {options.html}")
    return 0


def load_rows(name: str, split: str) -> Any:
    """A split of a local file, or of a folder or hub name that ``datasets.load_dataset`` knows.

    Raises:
        DataError: It cannot be read.
    """
    from datasets import load_dataset

    reader = _READERS.get(Path(name).suffix)
    try:
        if reader and Path(name).is_file():
            return load_dataset(reader, data_files={split: name}, split=split)
        return load_dataset(name, split=split)
    except Exception as cause:
        raise DataError(
            f"DATASET {name!r}, which cannot be read: {type(cause).__name__}: {cause}",
            f"a file ending in {', '.join(_READERS)}, or what datasets.load_dataset takes",
            "hf-mlx preview rows.jsonl --model path/to/model",
        ) from cause


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model.

    Raises:
        ModelError: It cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as cause:
        raise ModelError(
            f"--model {name!r}, whose tokenizer cannot be loaded: {cause}",
            "a folder with a tokenizer, or a hub name this machine can reach",
            "hf-mlx preview rows.jsonl --model path/to/model",
        ) from cause
