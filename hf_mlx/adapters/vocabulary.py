"""Weights of embedding and head that travel with an adapter: those of a resized model, or of ends that it adapts.

PEFT 0.21 (``get_peft_model_state_dict``, ``save_embedding_layers="auto"``) writes everything below both ends, under the
names that its own wrappers give it, as soon as the base's ``vocab_size`` is not the model's, or an end is targeted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ..errors import AdapterError
from ..models.load import module_at
from ..models.vocabulary import Undo, count_rows, find_ends, head_path, put_rows, untie_head
from ..settings.plan import LoraPlan
from .adapter import PREFIX
from .blueprint import Blueprint, draw_blueprint
from .sites import is_tied
from .slots import Slot
from .targets import is_all_linear, is_matched, resolve_selector

if TYPE_CHECKING:
    from ..models.load import LoadedModel

# What PEFT's wrappers put between an end's path and its frozen weight: LoRA, trained rows, a copy trained in full.
_WRAPPED = (".base_layer", ".token_adapter.base_layer", ".original_module")
_LEAVES = ("weight", "bias")
Shapes = Mapping[str, tuple[int, ...]]
Tensors = Mapping[str, mx.array]


def draw_untied(loaded: LoadedModel, plan: LoraPlan, last_n_layers: int | None = None) -> Blueprint:
    """:func:`draw_blueprint`, after the head of a tied model is untied where ``plan`` trains one of the two ends.

    As in PEFT, LoRA or ``modules_to_save`` on one end of a tied pair leaves the other as it was.

    Raises:
        AdapterError: As for :func:`draw_blueprint`; the model is then as it was.
    """
    apart = is_tied(loaded) and not plan.ensure_weight_tying and _trains_an_end(loaded, plan)
    undo = untie_head(loaded) if apart else None
    try:
        return draw_blueprint(loaded, plan, last_n_layers)
    except BaseException:
        if undo is not None:
            undo()
        raise


def carried_slots(loaded: LoadedModel, blueprint: Blueprint) -> dict[str, Slot]:
    """Every PEFT key under which a frozen weight of an end may travel → the MLX parameter, once adapted.

    Of a tied model both ends' keys go into the embedding. What nothing computes with, the original of an end that is
    trained in full and PEFT's second copy of it, goes nowhere (an empty path).
    """
    adapted = {target.mlx_path for target in blueprint.targets}
    saved = {site.mlx_path for site in blueprint.saved}
    rows = {chosen.site.mlx_path: len(chosen.indices) for chosen in blueprint.rows}
    found: dict[str, Slot] = {}
    for hf_path, path in _named_ends(loaded):
        module = _base_of(module_at(loaded.model, path))
        stem = f"{PREFIX}{hf_path}"
        for leaf, value in _weights(module).items():
            shape = tuple(value.shape)
            if path in saved:
                keys = (f"{stem}.original_module.{leaf}", f"{stem}.modules_to_save.{leaf}")
                found |= dict.fromkeys(keys, Slot("", shape, base=True))
            elif path in rows:
                where = f"{path}.base_layer.{leaf}"
                found[f"{stem}.token_adapter.base_layer.{leaf}"] = Slot(where, shape, base=True, as_stored=True)
                # A tied head's rows are the embedding's, of which PEFT may write a second copy.
                found[f"{stem}.token_adapter.trainable_tokens_delta"] = Slot("", (rows[path], shape[1]), base=True)
            elif path in adapted:
                found[f"{stem}.base_layer.{leaf}"] = Slot(f"{path}.base_layer.{leaf}", shape, base=True, as_stored=True)
            else:
                found[f"{stem}.{leaf}"] = Slot(f"{path}.{leaf}", shape, base=True, as_stored=True)
    return found


def read_carried(loaded: LoadedModel, carried: Mapping[str, Slot], tensors: Tensors) -> dict[str, mx.array]:
    """The frozen weights of both ends that a file holds.

    Of a model that torch ties, and whose frozen ends are thus one tensor, PEFT may write it under one name: then it is
    that of the other end, too.

    Args:
        loaded: The model, adapted.
        carried: What :func:`carried_slots` names.
        tensors: Those of the file, by PEFT's keys.

    Returns:
        MLX path → (rows, dim), as stored.
    """
    found = {slot.mlx_path: tensors[key] for key, slot in carried.items() if key in tensors and slot.mlx_path}
    weights = {slot.mlx_path for slot in carried.values() if slot.mlx_path.endswith(".weight")}
    there = next((path for path in found if path in weights), None)
    if loaded.untied and there is not None:
        found = dict.fromkeys(weights, found[there]) | found
    return found


def put_carried(
    loaded: LoadedModel, plan: LoraPlan, shapes: Shapes, read: Callable[[], Tensors], folder: Path
) -> Undo | None:
    """Bring the frozen ends that an adapter file holds into the model, which takes on their number of rows.

    Args:
        loaded: The base, without adapter.
        plan: The adapter's.
        shapes: Key → shape of the file.
        read: Gives its tensors; called only where there is something to put.
        folder: For messages.

    Returns:
        Puts everything back; None where nothing changed.

    Raises:
        AdapterError: Ends of several sizes, a size without the weights to go with it, or two ends of a tied model.
    """
    if find_ends(loaded) is None:
        return None
    ends = _named_ends(loaded)
    rows = count_rows(loaded)
    wanted = _rows_asked(loaded, ends, shapes, folder)
    resized = wanted not in (None, rows)
    sources = _sources(ends, plan, shapes, trained_too=resized)
    if resized and set(sources) != {path for _, path in ends}:
        lost = next(hf_path for hf_path, path in ends if path not in sources)
        raise AdapterError(
            f"{folder}: an adapter of a model resized to {wanted} tokens, without the weights of its {lost}",
            f"the {wanted} rows of {lost}, or a base with that many ({loaded.path} has {rows})",
            'the resized base beside it: base.save_pretrained("resized"), then --base resized; or '
            "export_adapter(trainer, dir), which writes both ends",
        )
    if not sources:
        return None
    arrays = _arrays(loaded, sources, read(), folder)
    if not resized and not _changes(loaded, arrays):
        return None
    before, undo = loaded.resized, put_rows(loaded, arrays)
    loaded.resized = before or resized

    def put_back() -> None:
        undo()
        loaded.resized = before

    return put_back


def _trains_an_end(loaded: LoadedModel, plan: LoraPlan) -> bool:
    if find_ends(loaded) is None:
        return False
    selector = resolve_selector(plan, loaded.model_type)
    paths = [hf_path for hf_path, _ in _named_ends(loaded)]
    targeted = not is_all_linear(selector) and any(is_matched(plan, selector, path) for path in paths)
    return targeted or any(path.endswith(name) for path in paths for name in plan.modules_to_save or ())


def _named_ends(loaded: LoadedModel) -> list[tuple[str, str]]:
    """(HF path, MLX path) of embedding and head; a tied head's MLX path is the embedding's."""
    ends = find_ends(loaded)
    if ends is None:
        return []
    to_hf = loaded.names.to_hf_modules
    head = ends.head or head_path(loaded)
    return [(to_hf(ends.embedding)[0], ends.embedding), (to_hf(head)[0], ends.head or ends.embedding)]


def _rows_asked(loaded: LoadedModel, ends: list[tuple[str, str]], shapes: Shapes, folder: Path) -> int | None:
    """The number of rows that the file's tensors have, None where they say nothing or are of another width."""
    found: dict[int, str] = {}
    width = _width(module_at(loaded.model, ends[0][1]))
    for hf_path, _ in ends:
        stem = f"{PREFIX}{hf_path}"
        whole = [f"{stem}{part}.weight" for part in (*_WRAPPED, ".modules_to_save", "")]
        if any(shapes[key][1:] != (width,) for key in whole if key in shapes):
            return None
        found |= {shapes[key][0]: key for key in whole if key in shapes}
        low = {f"{stem}.lora_embedding_A": 1, f"{stem}.lora_B.weight": 0}
        found |= {shapes[key][axis]: key for key, axis in low.items() if len(shapes.get(key, ())) == 2}
    if len(found) > 1:
        (rows, key), (others, other) = list(found.items())[:2]
        raise AdapterError(
            f"{folder}: {rows} tokens in {key}, {others} in {other}",
            "one number of tokens in embedding and head",
            "the adapter as it was saved: fetch it again",
        )
    return next(iter(found), None)


def _sources(ends: list[tuple[str, str]], plan: LoraPlan, shapes: Shapes, *, trained_too: bool) -> dict[str, list[str]]:
    """MLX path → stems of keys in the file that give the frozen weight; a trained one's, where there is no other."""
    frozen: dict[str, list[str]] = {}
    trained: dict[str, list[str]] = {}
    for hf_path, path in ends:
        stem = f"{PREFIX}{hf_path}"
        saved = any(
            end.endswith(name) for end in _saved_with(hf_path, ends, plan) for name in plan.modules_to_save or ()
        )
        parts = _WRAPPED if saved else (*_WRAPPED, "")
        found = next((f"{stem}{part}" for part in parts if f"{stem}{part}.weight" in shapes), None)
        if found is not None:
            frozen.setdefault(path, []).append(found)
        elif trained_too and f"{stem}.weight" in shapes:
            trained.setdefault(path, []).append(stem)
    return {path: stems[:1] for path, stems in trained.items()} | frozen


def _saved_with(hf_path: str, ends: list[tuple[str, str]], plan: LoraPlan) -> list[str]:
    """The ends that are trained when this one is."""
    tied = plan.ensure_weight_tying and len({path for _, path in ends}) == 1
    return [end for end, _ in ends] if tied else [hf_path]


def _arrays(loaded: LoadedModel, sources: Mapping[str, list[str]], tensors: Tensors, folder: Path) -> dict[str, Any]:
    arrays = {}
    for path, stems in sources.items():
        held = module_at(loaded.model, path)
        for leaf in ("weight", *(("bias",) if "bias" in held else ())):
            values = [tensors[f"{stem}.{leaf}"] for stem in stems if f"{stem}.{leaf}" in tensors]
            if len(values) > 1 and not mx.array_equal(values[0], values[1]).item():
                raise AdapterError(
                    f"{folder}: {stems[0]}.{leaf} and {stems[1]}.{leaf} of other values",
                    f"one and the same, since {loaded.path} ties its head to its embedding",
                    "a base whose head is not tied: config.tie_word_embeddings=False, saved with save_pretrained",
                )
            if values:
                dtype = held.scales.dtype if "scales" in held else held[leaf].dtype
                arrays[f"{path}.{leaf}"] = values[0].astype(dtype)
    return arrays


def _changes(loaded: LoadedModel, arrays: Tensors) -> bool:
    for name, value in arrays.items():
        path, _, leaf = name.rpartition(".")
        held = module_at(loaded.model, path)
        if "scales" in held or held[leaf].shape != value.shape or not mx.array_equal(held[leaf], value).item():
            return True
    return False


def _weights(module: Any) -> dict[str, mx.array]:
    packed = "scales" in module
    return {leaf: module[leaf] for leaf in _LEAVES if leaf in module and not (packed and leaf == "weight")}


def _width(module: Any) -> int:
    return module.weight.shape[1] * 32 // module.bits if "scales" in module else module.weight.shape[1]


def _base_of(module: Any) -> Any:
    return module.base_layer if "base_layer" in module else module
