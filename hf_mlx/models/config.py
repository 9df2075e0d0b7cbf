"""HF ``config.json`` → the keys mlx-lm reads: one declarative normaliser.

transformers 5 nests what transformers 4 kept flat (``rope_parameters``), and mlx-lm mostly reads the flat
keys and falls back to its own defaults without a word. :func:`normalise` writes both spellings out;
what one model type needs beyond that stands in :mod:`hf_mlx.models.dialects`.
"""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Any

from ..errors import ModelError
from ..intake import Intake, describe, has_type, lies, show
from .dialects import DIALECTS

Config = dict[str, Any]

# Non-finite floats are tagged so that config.json stays JSON (transformers 5.23, PreTrainedConfig.to_json_string).
FILES = Intake(ModelError, "fetch the file again, or save the model again with model.save_pretrained(folder)")
# Of the keys that this library or mlx-lm read beside those that transformers' own class checks.
_TYPES: dict[str, Any] = {
    "model_type": (str, None),
    "architectures": (list, None),
    "dtype": (str, None),
    "torch_dtype": (str, None),
    "text_config": (dict, None),
    "vision_config": (dict, None),
    "quantization": (dict, None),
    "quantization_config": (dict, None),
    "rope_parameters": (dict, None),
    "rope_scaling": (dict, None),
    "auto_map": (dict, None),
}
# The one limit that is no limit, as transformers 4 writes it (mamba2, nemotron_h).
_UNBOUNDED = ("time_step_limit",)
_MAX_LAYERS = 10_000
# No size, constant or id of a model is as large; transformers 4 writes 10**30 for a length without a limit.
_MAX_NUMBER = 1 << 53
_LAYERS = re.compile(r"(num_)?(\w+_)?(layers?|blocks?|experts)(_\w+)?|n_(layers?|blocks?|experts)")
_TAGGED = {"Infinity": float("inf"), "-Infinity": float("-inf"), "NaN": float("nan")}


def read_config(folder: Path) -> Config:
    """Reads ``folder/config.json`` as it was written.

    Raises:
        ModelError: The file is missing, is not a JSON object, or names no model_type.
    """
    path = folder / "config.json"
    if not lies(path):
        raise ModelError(
            f"{folder}: no config.json ({_listing(folder)})",
            "a folder that model.save_pretrained(folder) wrote",
            _remedy_without_config(folder),
        )
    config = FILES.read_json(path, _TYPES)
    if not isinstance(config.get("model_type"), str):
        raise ModelError(
            f"{path}: names no model_type",
            'a JSON object with "model_type"',
            "save the model again with model.save_pretrained(folder); the key is written by transformers",
        )
    _check_numbers(config, path)
    return _untag(config)


def check_generation_config(folder: Path) -> None:
    """Prove generation_config.json where it is there: transformers takes one that it cannot read for absent.

    Raises:
        ModelError: It is not readable, not a JSON object, or a token id in it is none.
    """
    path = folder / "generation_config.json"
    if not lies(path):
        return
    content = FILES.read_json(path, finite=True)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = content.get(key)
        ids = value if isinstance(value, list) and key == "eos_token_id" else [value]
        if not all(has_type(item, (int, None)) for item in ids):
            raise FILES.refuse(path, f"{key}={show(value)}", f"{key}: a token id")


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
            f"config.json of model type {config['model_type']!r}: transformers cannot read it ({describe(error)})",
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


def _check_numbers(config: Config, path: Path, inside: str = "") -> None:
    """Refuse numbers that no model has: classes and loops would take them at their word."""
    for key, value in config.items():
        for number in value if isinstance(value, list) else [value]:
            infinite = isinstance(number, float) and not math.isfinite(number)
            if infinite and not (key in _UNBOUNDED and number > 0):
                raise FILES.refuse(path, f"{inside}{key}={show(value)}", "finite numbers")
            if isinstance(number, (int, float)) and abs(number) >= _MAX_NUMBER and "max_length" not in key:
                raise FILES.refuse(path, f"{inside}{key}={show(value)}", "numbers of a model's size")
            if isinstance(number, int) and number > _MAX_LAYERS and _LAYERS.fullmatch(key):
                raise FILES.refuse(path, f"{inside}{key}={show(value)}", f"at most {_MAX_LAYERS}")
        if isinstance(value, dict):
            _check_numbers(value, path, f"{inside}{key}.")


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
