"""What ``hf-mlx run`` changes in its own process, and nowhere else.

A script that is run unedited imports its trainer from trl, asks CUDA things of torch and transformers, and writes names
that they had when it was written. The user asked for all of that to be answered by running it under this command; no
other code path imports this package. Nothing is imported on the script's behalf: a library is changed once the script
imports it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from .absent import offer_absent
from .arguments import translate_configs
from .bitsandbytes import offer_bitsandbytes
from .homes import STAND_INS, replace_trainer
from .hub import go_on_without_login, translate_datasets
from .imports import Imports
from .keywords import translate_keywords
from .loading import translate_loading
from .notebooks import Shell, compile_script
from .older import offer_older_names
from .own import follow_own
from .parsers import translate_parsers
from .talk import Talk, say
from .together import join_processes
from .tokenizers import keep_tokenizers
from .trainers import derive_trainer

__all__ = ["Imports", "Shell", "Talk", "compile_script", "install", "say"]


def install(
    *, strict: bool = False, dry_run: bool = False, on_built: Callable[[], None] = lambda: None
) -> tuple[Imports, Talk]:
    """Put the trainers and the translations in place, for this process.

    Args:
        strict: Default of the trainers' own ``strict``; CUDA's questions go to torch.
        dry_run: ``train()`` prints what would happen and ends the script with status 0.
        on_built: Called when a trainer has been constructed.

    Returns:
        Where to wait for the script's imports, and what is said about them.
    """
    imports, talk = Imports(), Talk()
    join_processes(imports)
    for row in STAND_INS:
        translate = functools.partial(translate_keywords, talk=talk, trainer=row.name, older=row.older_keywords)
        derive = functools.partial(
            derive_trainer, name=row.name, strict=strict, dry_run=dry_run, on_built=on_built, translate=translate
        )
        replace_trainer(row, derive, imports)
    follow_own(imports, strict=strict, dry_run=dry_run, on_built=on_built)
    translate_configs(imports, talk, strict=strict)
    translate_loading(imports, talk)
    offer_older_names(imports, talk)
    translate_parsers(imports, talk)
    translate_datasets(imports, talk)
    keep_tokenizers(imports, talk)
    if not strict:
        offer_absent(imports, talk)
        go_on_without_login(imports, talk)
        offer_bitsandbytes(imports, talk)
        imports.after("torch", functools.partial(_answer_cuda, talk=talk))
    imports.watch()
    return imports, talk


def _answer_cuda(torch: Any, talk: Talk) -> None:
    if torch.cuda.is_available():
        return
    from .cuda import answer_cuda
    from .devices import land_devices

    answer_cuda(torch, talk)
    land_devices(torch, talk)
