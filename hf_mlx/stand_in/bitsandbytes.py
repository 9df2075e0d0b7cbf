"""``import bitsandbytes as bnb`` in a script, which looks for the names of quantised layers with it.

A model that was to be quantised is loaded in floating point here, so its Linear layers are what the script looks for.
Libraries go on finding that bitsandbytes is not installed.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

from .callers import script_imports
from .imports import Imports
from .talk import Talk

_NAME = "bitsandbytes"


def offer_bitsandbytes(imports: Imports, talk: Talk) -> None:
    """Let the script import it where it is not installed."""
    imports.provide(_NAME, script_imports)

    def fill(module: Any) -> None:
        if module.__spec__.origin is not None:
            # The real one.
            return
        import torch

        talk.once("bitsandbytes is not here: its Linear4bit and Linear8bitLt are torch.nn.Linear")
        # Below any release that transformers accepts.
        module.__version__ = "0.0"
        module.nn = SimpleNamespace(Linear4bit=torch.nn.Linear, Linear8bitLt=torch.nn.Linear)

    imports.after(_NAME, fill)
    imports.after("peft.import_utils", _tell_peft)


def _tell_peft(module: Any) -> None:
    """peft asks the import system, once for each of these, and would find what the script imported."""
    offered = sys.modules.pop(_NAME, None)
    try:
        module.is_bnb_available()
        module.is_bnb_4bit_available()
    finally:
        if offered is not None:
            sys.modules[_NAME] = offered
