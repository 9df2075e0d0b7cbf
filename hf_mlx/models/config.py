"""HF ``config.json`` → the keys mlx-lm reads: one declarative normaliser.

transformers 5 nests what transformers 4 kept flat (``rope_parameters``), and mlx-lm mostly reads the flat
keys and falls back to its own defaults without a word. :func:`normalise` writes both spellings out;
what one model type needs beyond that stands in :mod:`hf_mlx.models.dialects`.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from ..errors import ModelError
from .dialects import DIALECTS

Config = dict[str, Any]

# Non-finite floats are tagged so that config.json stays JSON (transformers 5.23, PreTrainedConfig.to_json_string).
_TAGGED = {"Infinity": float("inf"), "-Infinity": float("-inf"), "NaN": float("nan")}


def read_config(folder: Path) -> Config:
    """Reads ``folder/config.json`` as it was written.

    Raises:
        ModelError: The file is missing, is not a JSON object, or names no model_type.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(
            f"{folder}: no config.json ({_listing(folder)})",
            "a folder that model.save_pretrained(folder) wrote",
            _remedy_without_config(folder),
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(
            f"{path}: not readable as JSON ({error})",
            "a JSON object",
            "fetch config.json again, or save the model again with model.save_pretrained(folder)",
        ) from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError(
            f"{path}: names no model_type",
            'a JSON object with "model_type"',
            "save the model again with model.save_pretrained(folder); the key is written by transformers",
        )
    return _untag(config)


def interpret(config: Config) -> Config:
    """Reads a config as transformers does: old spellings translated, absent keys at the class's defaults.

    Args:
        config: ``config.json`` as written, by transformers 4 or 5.

    Returns:
        The transformers-5 dict; for a model type that transformers does not know, a plain copy.

    Raises:
        ModelError: transformers itself refuses the values.
    """
    from transformers import CONFIG_MAPPING

    config = copy.deepcopy(config)
    if config["model_type"] not in CONFIG_MAPPING:
        return config
    # mlx-lm's own quantisation record is not one that transformers knows.
    kept = {k: config.pop(k) for k in ("quantization", "quantization_config") if k in config}
    try:
        read = CONFIG_MAPPING[config["model_type"]].from_dict(config).to_dict()
    except Exception as error:  # each config class validates in its own way and raises its own type
        raise ModelError(
            f"config.json of model type {config['model_type']!r}: transformers cannot read it "
            f"({type(error).__name__}: {' '.join(str(error).split())[:300]})",
            "a config.json that AutoConfig.from_pretrained reads",
            "fetch config.json again, or save the model again with model.save_pretrained(folder)",
        ) from error
    return {**read, **kept, "architectures": config.get("architectures")}


def normalise(config: Config) -> Config:
    """Turns an interpreted config into one that mlx-lm reads as transformers does.

    Args:
        config: What :func:`interpret` returned.

    Returns:
        A copy under the keys that mlx-lm reads.
    """
    flat = copy.deepcopy(config)
    for part in (flat, flat.get("text_config")):
        if isinstance(part, dict):
            unnest_rope(part)
    dialect = DIALECTS.get(flat["model_type"])
    return dialect(flat) if dialect else flat


def unnest_rope(config: Config) -> None:
    """Writes ``rope_theta``, ``partial_rotary_factor`` and ``rope_scaling`` (with both type keys) in place.

    Per-layer-type rope_parameters (``{"full_attention": {…}, "sliding_attention": {…}}``) give their
    full-attention entry here; a dialect reads the other one.
    """
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and rope:
        nested = next((v for k in ("full_attention", "full") if isinstance(v := rope.get(k), dict)), None)
        flat = nested if nested is not None else rope
        for key in ("rope_theta", "partial_rotary_factor"):
            if flat.get(key) is not None:
                config[key] = flat[key]
        kind = flat.get("rope_type", flat.get("type", "default"))
        config["rope_scaling"] = None if kind == "default" else dict(flat)
    scaling = config.get("rope_scaling")
    if isinstance(scaling, dict):
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        # Old Phi-3 files say "su" for what transformers now calls longrope (transformers 5.23, Phi3Config).
        kind = "longrope" if kind == "su" else kind
        config["rope_scaling"] = None if kind == "default" else {**scaling, "type": kind, "rope_type": kind}


def _untag(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == {"__float__"} and value["__float__"] in _TAGGED:
            return _TAGGED[value["__float__"]]
        return {k: _untag(v) for k, v in value.items()}
    return [_untag(v) for v in value] if isinstance(value, list) else value


def _listing(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir())[:4]
    return "it holds " + ", ".join(names) if names else "it is empty"


def _remedy_without_config(folder: Path) -> str:
    if (folder / "adapter_config.json").exists():
        return "this is a PEFT adapter: pass the base model's folder or id as model="
    nested = next((p.parent for p in sorted(folder.glob("*/config.json"))), None)
    return f'model="{nested}"' if nested else "pass the folder that holds config.json and model.safetensors"
