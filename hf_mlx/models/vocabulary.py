"""The two ends of a model that have a row for each token, embedding and head: resized, and taken apart where tied."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from .heads import embedding_path, model_parts, ties_head
from .load import LoadedModel, module_at
from .overrides import own_head

HEADS = ("lm_head", "embed_out")
Undo = Callable[[], None]


@dataclass(frozen=True)
class Ends:
    """Module paths of the embedding and the head; ``head`` is None where the embedding is the head."""

    embedding: str
    head: str | None


def find_ends(loaded: LoadedModel) -> Ends | None:
    """Where the rows of the vocabulary are; None where mlx-lm's model keeps them in another place."""
    try:
        embedding = embedding_path(loaded.model)
    except TypeError:
        return None
    prefix, _ = model_parts(loaded.model)
    wrapper = module_at(loaded.model, prefix)
    head = None if ties_head(wrapper) else next((name for name in HEADS if name in wrapper), None)
    return Ends(embedding, None if head is None else f"{prefix}.{head}".lstrip("."))


def head_path(loaded: LoadedModel) -> str:
    """Where a head of the model's own is, or would be if it were not tied."""
    prefix, _ = model_parts(loaded.model)
    return f"{prefix}.{HEADS[0]}".lstrip(".")


def count_rows(loaded: LoadedModel) -> int:
    """Ids that the model can embed."""
    module = module_at(loaded.model, embedding_path(loaded.model))
    return (module.base_layer if "base_layer" in module else module).weight.shape[0]


def put_rows(loaded: LoadedModel, arrays: Mapping[str, mx.array]) -> Undo:
    """Replace weights (and biases) of embedding and head, whatever their number of rows, in place.

    Names, shapes and ``vocab_size`` of the config follow. A quantised layer gives way to one in floating point.

    Args:
        loaded: The model, without adapter.
        arrays: MLX path → (rows, ...), in the dtype of what they replace.

    Returns:
        Puts everything back.
    """
    modules, names, config = {}, loaded.names, loaded.config
    for path in dict.fromkeys(name.rpartition(".")[0] for name in arrays):
        modules[path] = module_at(loaded.model, path)
        own = {name.rpartition(".")[2]: value for name, value in arrays.items() if name.rpartition(".")[0] == path}
        _put(loaded.model, path, _with_weights(modules[path], own))
    loaded.names = names.with_shapes({name: tuple(value.shape) for name, value in arrays.items()})
    rows = next(value.shape[0] for name, value in arrays.items() if name.endswith(".weight"))
    loaded.config = _with_rows(config, rows)

    def undo() -> None:
        for path, module in modules.items():
            _put(loaded.model, path, module)
        loaded.names, loaded.config = names, config

    return undo


def untie_head(loaded: LoadedModel) -> Undo | None:
    """Give a tied model a head of its own that starts as the embedding; both are one array until one is changed.

    Returns:
        Ties it again; None where the model's code has no such head, or its embedding is quantised.
    """
    # Brings mlx-lm, and with it torch, which whoever only asks for rows must not pay for.
    from .precision import CastEmbedding, CastLinear

    ends = find_ends(loaded)
    prefix, _ = model_parts(loaded.model)
    wrapper: Any = module_at(loaded.model, prefix)
    holder = next((held for held in (getattr(wrapper, "args", None), wrapper) if _is_tied(held)), None)
    embedding: Any = None if ends is None else module_at(loaded.model, ends.embedding)
    headless = holder is None and loaded.model_type in own_head.EMBEDDINGS
    known = holder is not None or headless
    if ends is None or ends.head is not None or not known or type(embedding) not in (nn.Embedding, CastEmbedding):
        return None
    args: Any = getattr(wrapper, "args", None)
    names = loaded.names
    head = nn.Linear(1, 1, bias=False)
    # Its own array over the same memory: what a compiled step is called with is no constant of its trace.
    head.weight = mx.stop_gradient(embedding.weight)
    if isinstance(embedding, CastEmbedding):
        head = CastLinear(head, embedding.compute_dtype)
    head.train(embedding.training)
    wrapper.lm_head = head
    plain = type(wrapper)
    if headless:
        wrapper.__class__ = own_head.projecting(plain, loaded.model_type)
    elif holder is args:
        # A copy: other models of the same settings keep theirs.
        wrapper.args = copy.copy(args)
        wrapper.args.tie_word_embeddings = False
    else:
        wrapper.tie_word_embeddings = False
    path = head_path(loaded)
    loaded.untied = True
    loaded.names = names.with_shapes({f"{path}.weight": tuple(head.weight.shape)})

    def undo() -> None:
        wrapper.pop("lm_head", None)
        loaded.names, loaded.untied = names, False
        if headless:
            wrapper.__class__ = plain
        elif holder is args:
            wrapper.args = args
        else:
            wrapper.tie_word_embeddings = True

    return undo


def recorded_rows(source: str) -> int | None:
    """``vocab_size`` of a folder's config.json, or of a hub id's in the local cache; None where neither is there."""
    path: Any = Path(source).expanduser() / "config.json"
    if not path.is_file():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            path = try_to_load_from_cache(source, "config.json")
        except HFValidationError:
            return None
        if not isinstance(path, str):
            return None
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
        rows = (config.get("text_config") or config).get("vocab_size") or config.get("vocab_size")
    except (OSError, ValueError, AttributeError):
        return None
    return rows if isinstance(rows, int) else None


def _is_tied(held: Any) -> bool:
    return getattr(held, "tie_word_embeddings", False) is True


def _with_weights(module: Any, arrays: Mapping[str, mx.array]) -> nn.Module:
    if "scales" in module:
        fresh: Any = nn.Embedding(1, 1) if isinstance(module, nn.QuantizedEmbedding) else nn.Linear(1, 1, bias=False)
        fresh.train(module.training)
    else:
        # A copy, so that the module itself can be put back; the set of frozen names is its own.
        fresh = copy.copy(module)
        fresh._no_grad = set(module._no_grad)
    for leaf, value in arrays.items():
        fresh[leaf] = value
    return fresh


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    model.update_modules(tree_unflatten([(path, module)]))


def _with_rows(config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    changed = dict(config)
    if isinstance(config.get("text_config"), dict):
        changed["text_config"] = {**config["text_config"], "vocab_size": rows}
    if "vocab_size" in config or "text_config" not in changed:
        changed["vocab_size"] = rows
    return changed
