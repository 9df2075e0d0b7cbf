"""Names of trl, transformers and peft that have left since, under the names that scripts of their time import.

One table: where a script imports a name from, the name, the release without it, and what takes its place.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any, NamedTuple

from .imports import Imports
from .talk import Talk


class Older(NamedTuple):
    """A name that has left.

    Attributes:
        homes: Modules that had it.
        left: The first release without it.
        now: What takes its place, as ``module:name``.
    """

    homes: tuple[str, ...]
    left: str
    now: str


_OWN = "hf_mlx.stand_in.older_objects"
_HARDWARE = "hf_mlx.stand_in.older_hardware"
_TRL_UTILS = ("trl", "trl.trainer", "trl.trainer.utils")
_CLI = ("trl.commands.cli_utils", "trl.commands")
_TRL_IMPORTS = ("trl", "trl.import_utils")
_FORMATTING = ("trl.extras.dataset_formatting",)

OLDER: Mapping[str, Older] = {
    "setup_chat_format": Older(("trl", "trl.models", "trl.models.utils"), "trl 0.26", f"{_OWN}:setup_chat_format"),
    "ChatMlSpecialTokens": Older(("trl.models.utils",), "trl 0.27", f"{_OWN}:ChatMlSpecialTokens"),
    "DataCollatorForCompletionOnlyLM": Older(_TRL_UTILS, "trl 0.20", f"{_OWN}:DataCollatorForCompletionOnlyLM"),
    "ConstantLengthDataset": Older(_TRL_UTILS, "trl 0.20", f"{_OWN}:ConstantLengthDataset"),
    "get_kbit_device_map": Older(_TRL_UTILS, "trl 1.8", f"{_OWN}:get_kbit_device_map"),
    "peft_module_casting_to_bf16": Older(
        ("trl.trainer", "trl.trainer.utils"), "trl 0.27", f"{_OWN}:peft_module_casting_to_bf16"
    ),
    "SIMPLE_CHAT_TEMPLATE": Older(("trl.trainer.utils",), "trl 0.27", f"{_OWN}:SIMPLE_CHAT_TEMPLATE"),
    "SIMPLE_SFT_CHAT_TEMPLATE": Older(("trl.trainer.utils",), "trl 0.25", f"{_OWN}:SIMPLE_SFT_CHAT_TEMPLATE"),
    "TrlParser": Older(_CLI, "trl 0.13", "trl:TrlParser"),
    "init_zero_verbose": Older(_CLI, "trl 0.13", "trl:init_zero_verbose"),
    "SFTScriptArguments": Older(("trl", *_CLI), "trl 0.13", f"{_OWN}:SFTScriptArguments"),
    "SftScriptArguments": Older(_CLI, "trl 0.9", f"{_OWN}:SftScriptArguments"),
    "get_formatting_func_from_dataset": Older(_FORMATTING, "trl 0.27", f"{_OWN}:get_formatting_func_from_dataset"),
    "conversations_formatting_function": Older(_FORMATTING, "trl 0.27", f"{_OWN}:conversations_formatting_function"),
    "instructions_formatting_function": Older(_FORMATTING, "trl 0.27", f"{_OWN}:instructions_formatting_function"),
    "strtobool": Older(("trl.env_utils",), "trl 0.13", f"{_HARDWARE}:strtobool"),
    "set_seed": Older(("trl", "trl.core"), "trl 0.14", "transformers:set_seed"),
    "is_peft_available": Older(_TRL_IMPORTS, "trl 0.11", "transformers.utils:is_peft_available"),
    "is_xpu_available": Older(_TRL_IMPORTS, "trl 0.11", "transformers:is_torch_xpu_available"),
    "is_npu_available": Older(_TRL_IMPORTS, "trl 0.11", "transformers:is_torch_npu_available"),
    "is_rich_available": Older(_TRL_IMPORTS, "trl 0.18", "transformers.utils:is_rich_available"),
    "is_unsloth_available": Older(("trl",), "trl 0.17", f"{_HARDWARE}:no"),
    "is_deepspeed_available": Older(("trl",), "trl 0.17", f"{_HARDWARE}:no"),
    "prepare_model_for_int8_training": Older(
        ("peft", "peft.utils", "peft.utils.other"), "peft 0.10", "peft:prepare_model_for_kbit_training"
    ),
    "AdamW": Older(("transformers", "transformers.optimization"), "transformers 4.50", f"{_OWN}:AdamW"),
    "AutoModelWithLMHead": Older(("transformers",), "transformers 4.52", "transformers:AutoModelForCausalLM"),
    "is_torch_tpu_available": Older(("transformers",), "transformers 4.51", f"{_HARDWARE}:no"),
    "is_ipex_available": Older(("transformers.utils",), "transformers 5.1", f"{_HARDWARE}:no"),
    "send_example_telemetry": Older(("transformers.utils",), "transformers 4.57", f"{_HARDWARE}:send_nothing"),
    "TextDataset": Older(("transformers",), "transformers 5.0", "hf_mlx.stand_in.older_data:TextDataset"),
    "LineByLineTextDataset": Older(
        ("transformers",), "transformers 5.0", "hf_mlx.stand_in.older_data:LineByLineTextDataset"
    ),
    "is_deepspeed_zero3_enabled": Older(
        ("transformers.deepspeed",), "transformers 4.46", "transformers.integrations:is_deepspeed_zero3_enabled"
    ),
    "HfDeepSpeedConfig": Older(
        ("transformers.deepspeed",), "transformers 4.46", "transformers.integrations:HfDeepSpeedConfig"
    ),
    "HfFolder": Older(("huggingface_hub",), "huggingface_hub 1.0", f"{_HARDWARE}:HfFolder"),
}
# Modules of that table that are gone as a whole.
GONE_MODULES = (
    "trl.commands", "trl.core", "trl.env_utils", "trl.extras.dataset_formatting", "transformers.deepspeed",
)  # fmt: skip


def offer_older_names(imports: Imports, talk: Talk) -> None:
    """Let modules answer for names that they had, once they are imported.

    What a release that is installed still has stays as it is.
    """
    homes = dict.fromkeys(home for older in OLDER.values() for home in older.homes)
    for home in homes:
        imports.after(home, _answering(home, talk))
    # This module executes transformers/__init__.py once more and puts the result in its place.
    again = _answering("transformers", talk)
    imports.after("transformers.processing_utils", lambda module: again(sys.modules["transformers"]))
    for name in GONE_MODULES:
        imports.provide(name)


def _answering(home: str, talk: Talk) -> Any:
    names = {name: older for name, older in OLDER.items() if home in older.homes}

    def answer(module: Any) -> None:
        base = type(module)
        if getattr(base, "offers_older", False):
            return

        class Module(base):
            offers_older = True

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
                talk.once(f"{home}.{name} left in {older.left}; its older meaning is kept")
                where, _, now = older.now.partition(":")
                value = getattr(import_module(where), now)
                setattr(self, name, value)
                return value

        Module.__name__, Module.__qualname__ = base.__name__, base.__qualname__
        module.__class__ = Module

    return answer
