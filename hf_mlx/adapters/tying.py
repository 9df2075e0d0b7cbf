"""``ensure_weight_tying``: what is trained of a tied embedding stays the head's, too.

Source: peft 0.21 ``LoraModel._add_modules_to_save_to_tie`` and ``BaseTuner._check_tied_modules``.
"""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING

from ..errors import AdapterError
from ..models.vocabulary import find_ends, head_path
from ..settings.plan import LoraPlan
from .matching import is_all_linear, is_matched
from .sites import is_tied
from .targets import resolve_selector

if TYPE_CHECKING:
    from ..models.load import LoadedModel

# peft.utils.constants.EMBEDDING_LAYER_NAMES, which alone sets PEFT's tying off.
_NAMES = ("embed_tokens", "lm_head")


def keep_tied(loaded: LoadedModel, plan: LoraPlan) -> LoraPlan:
    """``plan`` with the embedding in place of the head in ``modules_to_save``, where both are to stay one.

    A model that is not tied keeps the plan as it is: PEFT warns there and does nothing.

    Raises:
        AdapterError: ``target_modules`` names an end, whose two adapters PEFT trains as parameters of their own over
            one storage, each with its own optimizer step.
    """
    ends = find_ends(loaded) if plan.ensure_weight_tying and is_tied(loaded) else None
    if ends is None:
        return plan
    if any(name.rsplit(".", 1)[-1] in _NAMES for name in plan.modules_to_save or ()):
        return _with_embedding(loaded, plan, ends.embedding)
    selector = resolve_selector(plan, loaded.model_type)
    paths = [*_NAMES, loaded.names.to_hf_modules(ends.embedding)[0]]
    named = next((path for path in paths if not is_all_linear(selector) and is_matched(plan, selector, path)), None)
    if named is not None:
        raise AdapterError(
            f"ensure_weight_tying=True with {named} among target_modules",
            "an end trained in full or by rows (PEFT 0.21 steps the tied matrices twice, over one storage)",
            'LoraConfig(..., modules_to_save=["embed_tokens"], ensure_weight_tying=True), or '
            "ensure_weight_tying=False, which leaves the head as it is",
        )
    return plan


def _with_embedding(loaded: LoadedModel, plan: LoraPlan, embedding: str) -> LoraPlan:
    path = loaded.names.to_hf_modules(embedding)[0]
    head = loaded.names.to_hf_modules(head_path(loaded))[0]
    names = list(plan.modules_to_save or ())
    names += [] if path in names else [path]
    # PEFT takes out the first name that stands for the head.
    stands = next((name for name in names if re.match(rf"(^|.*\.){name}($|\..*)", head)), None)
    if stands is not None:
        names.remove(stands)
    return dataclasses.replace(plan, modules_to_save=tuple(names))
