"""The modules of a loaded model as PEFT would see them: HF paths, in torch's registration order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from .defaults import INTERLEAVED_TYPES
from .order import order_key

if TYPE_CHECKING:
    from ..models.load import LoadedModel

Kind = Literal["linear", "embedding", "experts", "router", "other"]
HEADS = ("lm_head", "embed_out")
# What each expert's projections are called → the parameters in which transformers 5 stacks them.
_FUSED = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "w1": "gate_up_proj", "w3": "gate_up_proj"}
_STACKED = {"w2": "down_proj"}


@dataclass(frozen=True)
class Site:
    """One module of the torch model, or one of its parameters that stack experts.

    Attributes:
        hf_path: Path in the torch model.
        mlx_path: Path in the MLX model; the first one, where MLX holds it in parts.
        module: The MLX module there.
        kind: What LoRA can do with it. ``"experts"`` and ``"router"`` are parameters in torch: PEFT reaches them by
            ``target_parameters`` alone.
        parts: (MLX path, module) of the further parts, in the order of the torch layer's rows.
        experts: How many experts the torch parameter stacks.
        strided: The parts' rows take turns.
    """

    hf_path: str
    mlx_path: str
    module: nn.Module
    kind: Kind
    parts: tuple[tuple[str, nn.Module], ...] = ()
    experts: int = 0
    strided: bool = False

    @property
    def modules(self) -> list[nn.Module]:
        """Every MLX module of it."""
        return [self.module, *(module for _, module in self.parts)]

    @property
    def parameter(self) -> str:
        """The torch parameter that holds its weight."""
        return self.hf_path if self.kind == "experts" else f"{self.hf_path}.weight"


def list_sites(loaded: LoadedModel) -> list[Site]:
    """Every module below the root, in ``named_modules()`` order of the torch class."""
    walked = list(_walk(loaded.model, ""))
    gated = {path.rpartition(".")[0] for path, _ in walked if path.endswith(".gate_proj")}
    found = [(_hf_path(loaded, path, module, gated), path, module) for path, module in walked]
    routers = _routers(found)
    grouped: dict[tuple[str, bool], list[tuple[str, nn.Module]]] = {}
    for hf_path, path, module in found:
        plain = _kind(module) == "other"
        # Containers may share an HF path with what they hold.
        grouped.setdefault((path if plain else hf_path, plain), []).append((path, module))
    sites = []
    strided = loaded.model_type in INTERLEAVED_TYPES
    hf_paths = {path: hf_path for hf_path, path, _ in found}
    for parts in grouped.values():
        (path, module), *rest = sorted(parts, key=lambda part: not part[0].endswith("gate_proj"))
        kind = "router" if path in routers else _kind(module)
        experts = _count_experts(loaded, path, module) if kind == "experts" else 0
        sites.append(Site(hf_paths[path], path, module, kind, tuple(rest), experts, strided))
    key = order_key(loaded.model_type, (site.hf_path for site in sites))
    return sorted(sites, key=lambda site: key(site.hf_path))


def is_tied(loaded: LoadedModel) -> bool:
    """Whether the head is the embedding: mlx-lm then has no head module at all."""
    return not loaded.scores and not any(path.rsplit(".", 1)[-1] in HEADS for path, _ in _walk(loaded.model, ""))


def layer_count(loaded: LoadedModel) -> int:
    """How many decoder blocks the model has."""
    blocks: Any = loaded.model.layers
    return len(blocks)


def _hf_path(loaded: LoadedModel, path: str, module: nn.Module, gated: set[str]) -> str:
    hf_path = loaded.names.to_hf_modules(path)[0]
    if _kind(module) != "experts" or ".experts.0." not in hf_path:
        return hf_path
    # Checkpoints hold each expert by itself, the torch model a stack of all.
    block, _, name = hf_path.rpartition(".experts.0.")
    fused = _FUSED if path.rpartition(".")[0] in gated else {}
    return f"{block}.experts.{fused.get(name) or _STACKED.get(name, name)}"


def _count_experts(loaded: LoadedModel, path: str, module: Any) -> int:
    """As many as torch stacks: LongCat's identity experts have weights there, which nothing reads."""
    first, *_ = loaded.names.to_hf_names(f"{path}.weight")
    count: int = module.num_experts
    while ".experts.0." in first and loaded.names.is_stored(first.replace(".experts.0.", f".experts.{count}.")):
        count += 1
    return count


def _routers(found: list[tuple[str, str, nn.Module]]) -> set[str]:
    """Routers, which are a class of their own in transformers 5: PEFT reaches their weight, and wraps no module."""
    blocks = {path.rsplit(".", 2)[0] for _, path, module in found if _kind(module) == "experts"}
    names = ("gate", "gate.proj", "router", "router.layer")
    candidates = {path: module for _, path, module in found if isinstance(module.get("weight"), mx.array)}
    return {path for path in candidates if any(path == f"{block}.{name}" for block in blocks for name in names)}


def _kind(module: nn.Module) -> Kind:
    if isinstance(module, (SwitchLinear, QuantizedSwitchLinear)):
        return "experts"
    # Multi-head latent attention keeps one Linear of torch as two of these.
    if isinstance(module, (nn.Linear, nn.QuantizedLinear, MultiLinear, QuantizedMultiLinear)):
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
