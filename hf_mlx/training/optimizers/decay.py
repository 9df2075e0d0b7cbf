"""Which parameters weight decay applies to."""

from __future__ import annotations

import re
from collections.abc import Iterable

# transformers 5.23, Trainer.get_decay_parameter_names
_EXEMPT = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def decay_names(names: Iterable[str], norm_modules: Iterable[str] = ()) -> frozenset[str]:
    """The names among ``names`` that decay: all but biases and normalisation weights.

    LoRA matrices, DoRA magnitudes and embeddings decay.

    Args:
        names: Parameter names as the HF model spells them.
        norm_modules: Names of the modules that are ``torch.nn.LayerNorm`` in the HF model; nothing in them decays,
            whatever it is called (GPT-2's ``ln_1``).
    """
    inside = tuple(f"{module}." for module in norm_modules)
    return frozenset(name for name in names if not name.startswith(inside) and not _EXEMPT.search(name.lower()))
