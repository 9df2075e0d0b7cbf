"""``hf-mlx explain``: what happens to each setting of a script, before anything is loaded."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import HFMLXError, SettingError
from ..intake import Intake
from ..settings.config_tables import DPO_TABLE, LM_TABLE, REWARD_TABLE, SFT_TABLE
from ..settings.ledger import Ledger, explain
from ..settings.legacy import translate_arguments

# The flags of `trl sft` that are not SFTConfig's: those of trl 1.16's ModelConfig that make the LoraConfig …
_LORA_FLAGS: Mapping[str, str] = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "lora_target_parameters": "target_parameters",
    "lora_modules_to_save": "modules_to_save",
    "lora_task_type": "task_type",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}
# … those that make the keywords of from_pretrained …
_MODEL_FLAGS: Mapping[str, str] = {
    "dtype": "dtype",
    "torch_dtype": "dtype",
    "model_revision": "revision",
    "attn_implementation": "attn_implementation",
    "load_in_4bit": "load_in_4bit",
    "load_in_8bit": "load_in_8bit",
}
# … and those that choose the model and the rows, which no verdict is about.
_SCRIPT_FLAGS = re.compile(
    r"model_name_or_path|use_peft|bnb_4bit_.*|use_bnb_nested_quant|datasets|dataset_(name|config|train_split|test_split"
    r"|streaming)|streaming|test_split_size|ignore_bias_buffers|config|env"
)
TABLES = {table.name: table for table in (SFT_TABLE, LM_TABLE, DPO_TABLE, REWARD_TABLE)}
_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command to ``hf-mlx``."""
    parser = subparsers.add_parser(
        "explain",
        help="say what happens to each setting on MLX",
        description="Print the verdict on each setting in FILE: HONOUR, ADAPT, NO-OP or REFUSE. Ends with status 1 "
        "when one of them is refused.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="JSON or YAML: the fields of SFTConfig, or of trl sft")
    parser.add_argument("--config", choices=sorted(TABLES), help="the class that the fields are of (by the fields)")
    parser.add_argument("--all", action="store_true", help="list the fields that are at their default too")
    parser.add_argument("--strict", action="store_true", help="also refuse what is done with other numbers")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line instead of a table")
    parser.set_defaults(run=run, needs_mlx=False)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command alone; returns its exit status."""
    parser = argparse.ArgumentParser(prog="hf-mlx")
    add_parser(parser.add_subparsers(required=True))
    options = parser.parse_args(argv)
    return options.run(options)


def run(options: argparse.Namespace) -> int:
    """Print the ledger of a file of settings; 0 when they can all be honoured, 1 when not."""
    try:
        args, peft_config, notes = read_settings(options.file)
        ledger = explain(args, peft_config, table=TABLES.get(options.config))
    except HFMLXError as error:
        print(error)
        return 1
    for note in notes:
        print(note, file=sys.stderr)
    _show(ledger, options)
    try:
        ledger.raise_refused(strict=options.strict)
    except SettingError as error:
        if not options.json:
            print(f"\n{error}")
        return 1
    return 0


def read_settings(path: str | Path) -> tuple[dict[str, Any], dict[str, Any] | None, list[str]]:
    """Read a file of settings: flat, as ``trl sft --config`` takes it, with an optional ``peft_config`` section.

    Returns:
        The fields of an SFTConfig, those of a LoraConfig or None, and a line for each older name that was translated.

    Raises:
        SettingError: The file cannot be read, or does not hold a mapping.
    """
    loaded = _load(Path(path))
    given = {str(name): _number(value) for name, value in loaded.items()}
    lora = {field: given.pop(flag) for flag, field in _LORA_FLAGS.items() if flag in given}
    lora |= given.pop("peft_config", None) or {}
    use_peft = given.pop("use_peft", bool(lora))
    model = {key: given.pop(flag) for flag, key in _MODEL_FLAGS.items() if flag in given}
    given = {name: value for name, value in given.items() if not _SCRIPT_FLAGS.fullmatch(name)}
    if model:
        given["model_init_kwargs"] = model | (given.get("model_init_kwargs") or {})
    args, notes = translate_arguments(given)
    return args, lora if use_peft else None, notes


def _load(path: Path) -> Mapping[str, Any]:
    try:
        text = Intake(SettingError, "hf-mlx explain args.json").read_text(path)
        if path.suffix in (".yaml", ".yml"):
            import yaml

            loaded = yaml.safe_load(text) or {}
        else:
            loaded = json.loads(text)
    except SettingError:
        raise
    except Exception as error:
        raise SettingError(f"{path}", f"is readable JSON or YAML ({error})", "hf-mlx explain args.json") from error
    if not isinstance(loaded, Mapping):
        raise SettingError(
            f"{path} with a {type(loaded).__name__}", "holds a mapping of field names", '{"learning_rate": 2e-4}'
        )
    return loaded


def _number(value: Any) -> Any:
    # YAML 1.1 reads 2e-4 as a string; the flags of `trl sft` are converted too.
    return float(value) if isinstance(value, str) and _FLOAT.fullmatch(value) else value


def _show(ledger: Ledger, options: argparse.Namespace) -> None:
    entries = ledger.entries if options.all else ledger.changed()
    if options.json:
        for entry in entries:
            row = {"field": entry.field, "value": entry.shown, "verdict": entry.verdict, "reason": entry.reason}
            print(json.dumps(row | ({"remedy": entry.remedy} if entry.remedy else {})))
        return
    ledger.show(changed_only=not options.all)
    if not options.all:
        print(f"{len(ledger) - len(entries)} more fields are at their default; --all lists them.")
