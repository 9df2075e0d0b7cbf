"""The modules of a loaded model as PEFT would see them: HF paths, in torch's registration order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import mlx.nn as nn
from mlx_lm.models.mla import MultiLinear
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from .defaults import EXPERT_NAMES
from .order import order_key

if TYPE_CHECKING:
    from ..models.load import LoadedModel

Kind = Literal["linear", "embedding", "experts", "other"]
HEADS = ("lm_head", "embed_out")


@dataclass(frozen=True)
class Site:
    """One module of the model.

    Attributes:
        hf_path: Path in the torch model; for stacked experts that of the first expert.
        mlx_path: Path in the MLX model.
        module: The module itself.
        kind: What LoRA can do with it.
        shared: The HF module is several MLX modules (a fused projection), so one adapter cannot fit it.
    """

    hf_path: str
    mlx_path: str
    module: nn.Module
    kind: Kind
    shared: bool = False


def list_sites(loaded: LoadedModel) -> list[Site]:
    """Every module below the root, in ``named_modules()`` order of the torch class."""
    found = [(loaded.names.to_hf_modules(path)[0], path, module) for path, module in _walk(loaded.model, "")]
    counts = Counter(hf_path for hf_path, _, module in found if _kind(module) != "other")
    routers = set() if loaded.model_type in EXPERT_NAMES else _routers(found)
    sites = []
    for hf_path, path, module in found:
        kind = "other" if path in routers else _kind(module)
        sites.append(Site(hf_path, path, module, kind, shared=kind != "other" and counts[hf_path] > 1))
    key = order_key(loaded.model_type, (site.hf_path for site in sites))
    return sorted(sites, key=lambda site: key(site.hf_path))


def is_tied(loaded: LoadedModel) -> bool:
    """Whether the head is the embedding: mlx-lm then has no head module at all."""
    return not any(path.rsplit(".", 1)[-1] in HEADS for path, _ in _walk(loaded.model, ""))


def layer_count(loaded: LoadedModel) -> int:
    """How many decoder blocks the model has."""
    blocks: Any = loaded.model.layers
    return len(blocks)


def _routers(found: list[tuple[str, str, nn.Module]]) -> set[str]:
    """Linear routers that are a class of their own in transformers 5, which PEFT does not wrap."""
    blocks = {path.rsplit(".", 2)[0] for _, path, module in found if _kind(module) == "experts"}
    names = ("gate", "gate.proj", "router", "router.layer")
    return {path for _, path, _ in found if any(path == f"{block}.{name}" for block in blocks for name in names)}


def _kind(module: nn.Module) -> Kind:
    if isinstance(module, (SwitchLinear, QuantizedSwitchLinear)):
        return "experts"
    # Multi-head latent attention keeps one Linear of torch as two of these.
    if isinstance(module, (nn.Linear, nn.QuantizedLinear, MultiLinear)):
        return "linear"
    if isinstance(module, (nn.Embedding, nn.QuantizedEmbedding)):
        return "embedding"
    return "other"


def _walk(value, path: str) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(value, nn.Module):
        if path:
            yield path, value
        children = value.children()
    else:
        children = value
    items = children.items() if isinstance(children, dict) else enumerate(children)
    for name, child in items:
        if isinstance(child, (nn.Module, list, dict)):
            yield from _walk(child, f"{path}.{name}" if path else str(name))
