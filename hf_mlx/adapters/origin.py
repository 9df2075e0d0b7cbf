"""The name of the base model that an exported adapter records: one that transformers loads on any machine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import AdapterError
from ..intake import lies
from .source import FILES

if TYPE_CHECKING:
    from ..models.load import LoadedModel

_SNAPSHOT = re.compile(r".*/models--(?P<repo>[^/]+)/snapshots/(?P<revision>[0-9a-f]{40})/?")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve_origin(loaded: LoadedModel, base: str | None = None, revision: str | None = None) -> tuple[str, str | None]:
    """``base_model_name_or_path`` and ``revision`` for adapter_config.json.

    A folder of the hub's cache stands for its repository. A model that was quantised for MLX stands for the
    model its card says it was made from, because PEFT cannot load it.

    Args:
        loaded: The model the adapter was trained on.
        base: What the user says it is; wins over everything.
        revision: The revision the user asked for.

    Raises:
        AdapterError: The base is an MLX quantisation and its card does not name the original.
    """
    if base is not None:
        return base, revision
    snapshot = _SNAPSHOT.fullmatch(loaded.path.absolute().as_posix())
    if loaded.config.get("quantization"):
        return _original(loaded.path), None
    if snapshot:
        return snapshot["repo"].replace("--", "/"), revision
    return str(loaded.path), revision


def _is_plain_model(folder: Path) -> bool:
    """Whether a folder holds a model that is not quantised for MLX."""
    path = folder / "config.json"
    return lies(path) and "quantization" not in FILES.read_json(path)


def _original(folder: Path) -> str:
    card = folder / "README.md"
    text = FILES.read_bytes(card).decode("utf-8", errors="replace") if lies(card) else ""
    front = text.split("---", 2)[1] if text.startswith("---") and text.count("---") >= 2 else ""
    found = re.search(r"^base_model:[ \t]*(?:\n\s*-[ \t]*)?(.+)$", front, re.MULTILINE)
    name = found[1].strip().strip("\"'") if found else ""
    if _HUB_ID.fullmatch(name) and not name.startswith("mlx-community/"):
        return name
    if name and _is_plain_model(Path(name).expanduser()):
        # mlx_lm.convert writes the folder that it was given.
        return str(Path(name).expanduser().absolute())
    raise AdapterError(
        f"base {folder}, quantised for MLX, whose README.md does not name the model it was made from",
        "a base that transformers can load, to write into adapter_config.json",
        f'a first line in {card}: "---", a second one: "base_model: owner/original-model", a third one: "---"; or '
        'quantise the original here: MLXSFTTrainer("owner/original-model", '
        'quantization_config={"load_in_4bit": True}); an adapter at hand: '
        'export_adapter(trainer, dir, base="owner/original-model")',
    )
