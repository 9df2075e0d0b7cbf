"""Names of trl, transformers and peft that have left since, under the names that scripts of their time import.

One table: where a script imports a name from, the name, the release without it, and what takes its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, NamedTuple

from .imports import Imports
from .talk import Talk


class Older(NamedTuple):
    """A name that has left.

    Attributes:
        homes: Modules that had it.
        left: The first release without it; None where that is not known.
        now: What takes its place, as ``module:name``.
    """

    homes: tuple[str, ...]
    left: str | None
    now: str


_OWN = "hf_mlx.stand_in.older_objects"
_TRL_UTILS = ("trl", "trl.trainer", "trl.trainer.utils")

OLDER: Mapping[str, Older] = {
    "setup_chat_format": Older(("trl", "trl.models", "trl.models.utils"), "trl 0.26", f"{_OWN}:setup_chat_format"),
    "ChatMlSpecialTokens": Older(("trl.models.utils",), "trl 0.26", f"{_OWN}:ChatMlSpecialTokens"),
    "DataCollatorForCompletionOnlyLM": Older(_TRL_UTILS, "trl 0.20", f"{_OWN}:DataCollatorForCompletionOnlyLM"),
    "ConstantLengthDataset": Older(_TRL_UTILS, "trl 0.20", f"{_OWN}:ConstantLengthDataset"),
    "get_kbit_device_map": Older(_TRL_UTILS, None, f"{_OWN}:get_kbit_device_map"),
    "peft_module_casting_to_bf16": Older(("trl.trainer.utils",), None, f"{_OWN}:peft_module_casting_to_bf16"),
    "get_peft_config": Older(("trl.commands.cli_utils",), "trl 0.12", "trl:get_peft_config"),
    "TrlParser": Older(("trl.commands.cli_utils", "trl.commands"), "trl 0.12", "trl:TrlParser"),
    "init_zero_verbose": Older(("trl.commands.cli_utils", "trl.commands"), "trl 0.12", "trl:init_zero_verbose"),
    "SFTScriptArguments": Older(("trl.commands.cli_utils", "trl"), "trl 0.12", f"{_OWN}:SFTScriptArguments"),
    "is_peft_available": Older(("trl.import_utils", "trl"), None, "peft.import_utils:is_peft_available"),
    "get_formatting_func_from_dataset": Older(
        ("trl.extras.dataset_formatting",), None, f"{_OWN}:get_formatting_func_from_dataset"
    ),
    "prepare_model_for_int8_training": Older(("peft",), "peft 0.10", "peft:prepare_model_for_kbit_training"),
    "AdamW": Older(("transformers", "transformers.optimization"), "transformers 5.0", f"{_OWN}:AdamW"),
}
# Modules of that table that are gone as a whole, each after the package it is in.
GONE_MODULES = ("trl.commands", "trl.commands.cli_utils", "trl.extras.dataset_formatting")


def offer_older_names(imports: Imports, talk: Talk) -> None:
    """Let modules answer for names that they had, once they are imported.

    What a release that is installed still has stays as it is.
    """
    homes = dict.fromkeys(home for older in OLDER.values() for home in older.homes)
    for home in homes:
        imports.after(home, _answering(home, talk))
    for name in GONE_MODULES:
        imports.provide(name)


def _answering(home: str, talk: Talk) -> Any:
    names = {name: older for name, older in OLDER.items() if home in older.homes}

    def answer(module: Any) -> None:
        base = type(module)

        class Module(base):
            def __getattr__(self, name: str) -> Any:
                try:
                    # A lazy package's own; a plain module has none.
                    return super().__getattr__(name)
                except AttributeError:
                    if name not in names:
                        if not hasattr(base, "__getattr__"):
                            raise AttributeError(f"module {home!r} has no attribute {name!r}") from None
                        raise
                older = names[name]
                left = f" left in {older.left}" if older.left else " is not in this release"
                talk.once(f"{home}.{name}{left}; its older meaning is kept")
                where, _, now = older.now.partition(":")
                value = getattr(import_module(where), now)
                setattr(self, name, value)
                return value

        Module.__name__, Module.__qualname__ = base.__name__, base.__qualname__
        module.__class__ = Module

    return answer
