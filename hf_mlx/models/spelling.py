"""config.json for two readers: transformers' own keys, and those that mlx-lm looks for beside them.

transformers 5 writes ``rope_parameters`` and calls some sizes otherwise than mlx-lm 0.32 does, which falls back to
values of its own without a word. LM Studio's MLX engine is mlx-lm.
"""

from __future__ import annotations

import importlib
import json
from typing import Any

from .config import Config, interpret, normalise


def spell_out(config: Config) -> Config:
    """Add what mlx-lm reads under other names, where transformers goes on reading the same config.

    Args:
        config: As it would be written.

    Returns:
        ``config`` with keys added; no value that it has is changed. Each key was tried: what transformers' own class
        reads with it is what it reads without.
    """
    # transformers makes torch's object of it where it believes that torch is there.
    plain = {key: value for key, value in config.items() if key != "dtype"}
    read = interpret(plain)
    flat = normalise(read)
    added: Config = {}
    for key in _fields(flat["model_type"]):
        value = flat.get(key)
        if value is None or key in config or not _is_json(value):
            continue
        again = interpret({**plain, **added, key: value})
        if all(again.get(name) == held for name, held in read.items()):
            added[key] = value
    return {**config, **added}


def _fields(model_type: str) -> list[str]:
    from mlx_lm.utils import MODEL_REMAPPING

    try:
        module = importlib.import_module(f"mlx_lm.models.{MODEL_REMAPPING.get(model_type, model_type)}")
    except ImportError:
        return []
    return list(getattr(module.ModelArgs, "__dataclass_fields__", ()))


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True
