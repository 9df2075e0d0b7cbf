"""Which modules a LoraConfig adapts, and with what rank and scale."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import AdapterError
from ..settings.plan import LoraPlan
from .defaults import (
    BYPASSED_MODULES,
    IDLE_MODULES,
    LOST_ON_LOADING,
    RENAMED_MODULES,
    REWRITTEN_NAMES,
    TARGET_MODULES,
    UNWRAPPED_MODULES,
)
from .experts import choose_parameters, plain_names
from .idle import Tower
from .layers import layer_dims
from .matching import Selector, is_all_linear, is_excluded, is_matched, layer_index, pattern_value
from .sites import HEADS, Kind, Site


@dataclass(frozen=True)
class Target:
    """One adapted module or parameter of the torch model.

    Attributes:
        mlx_path: Where its pair is in the MLX model.
        hf_path: Its path in the torch model.
        kind: What it is there.
        r, alpha, scale: Rank, alpha and the resulting factor.
        key: The module under which PEFT keeps the pair.
        parameter: What ``rank_pattern`` and ``alpha_pattern`` are matched with.
        parts: Further MLX paths that hold parts of it.
        idle: (in, out) of a layer that no token reaches, whose pair is only drawn and saved; it has no ``mlx_path``.
    """

    mlx_path: str
    hf_path: str
    kind: Kind
    r: int
    alpha: float
    scale: float
    key: str = ""
    parameter: str = ""
    parts: tuple[str, ...] = ()
    idle: tuple[int, int] | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        """Every MLX path at which there is an adapted layer."""
        return () if self.idle else (self.mlx_path, *self.parts)


def resolve_selector(plan: LoraPlan, model_type: str) -> Selector:
    """``target_modules`` with None replaced by PEFT's default for the architecture.

    Raises:
        AdapterError: PEFT has no default for this model type, or the list is empty.
    """
    names = '["q_proj", "k_proj", "v_proj", "o_proj"]' if model_type in REWRITTEN_NAMES else '"all-linear"'
    remedy = f"LoraConfig(target_modules={names})"
    selector = plan.target_modules
    if selector is None:
        selector = TARGET_MODULES.get(model_type) or (() if plan.target_parameters else None)
        if selector is None:
            raise AdapterError(
                f"target_modules=None for model type {model_type!r}",
                "a model type for which PEFT has a default",
                remedy,
            )
    if not selector and not plan.target_parameters:
        raise AdapterError(
            f"target_modules={plan.target_modules!r}",
            "at least one module to adapt",
            remedy,
        )
    return selector


def select_targets(
    sites: Iterable[Site],
    plan: LoraPlan,
    model_type: str,
    *,
    tied: bool,
    layers: range | None = None,
    tower: Tower | None = None,
) -> list[Target]:
    """The modules to adapt, in HF order, idle ones among them.

    Args:
        sites: Every module of the model, in HF order.
        plan: The LoraConfig as plain values.
        model_type: The HF config's model type.
        tied: The head is the embedding.
        layers: Restrict to these decoder blocks, counted from 0.
        tower: The torch model's modules that MLX does not load.

    Raises:
        AdapterError: Nothing matches, a match cannot carry LoRA, or a rank is not positive.
    """
    sites = list(sites)
    selector = resolve_selector(plan, model_type)
    modules = _choose(sites, plan, selector, model_type)
    if layers is not None:
        modules = [site for site in modules if layer_index(site.mlx_path, None) in layers]
    parameters = choose_parameters(sites, plan, modules, model_type, restricted=layers is not None)
    if not modules and not parameters:
        raise _no_match(sites, plan, selector, model_type)
    for site in modules:
        _check_site(site, model_type, plan)
    if tied:
        _check_untied(modules, plan, selector)
    unread = tower.choose(plan, selector) if tower is not None and layers is None else []
    chosen = [_target(site, plan, site.hf_path, site.hf_path, model_type) for site in modules]
    if tower is not None and unread:
        chosen += [_idle_target(path, plan, tower.linear[path]) for path in unread]
        chosen.sort(key=lambda target: tower.order[target.hf_path])
    # PEFT wraps (and draws first values for) all modules before any parameter.
    return [
        *chosen,
        *(_target(site, plan, site.parameter, key) for site, key in parameters),
    ]


def _choose(sites: list[Site], plan: LoraPlan, selector: Selector, model_type: str) -> list[Site]:
    # Experts are parameters in transformers 5, which no name in target_modules reaches.
    sites = [site for site in sites if site.kind != "experts"]
    if not is_all_linear(selector):
        return [site for site in sites if is_matched(plan, selector, site.hf_path)]
    unwrapped = UNWRAPPED_MODULES.get(model_type, ())
    named = [(site, site.hf_path.rsplit(".", 1)[-1]) for site in sites if not is_excluded(plan, site.hf_path)]
    return [site for site, leaf in named if (site.kind == "linear" and leaf not in HEADS) or leaf in unwrapped]


def _target(site: Site, plan: LoraPlan, path: str, key: str, model_type: str = "") -> Target:
    if site.hf_path.rsplit(".", 1)[-1] in IDLE_MODULES.get(model_type, ()):
        return _idle_target(path, plan, layer_dims(site.module))
    r, alpha, scale = _scale(plan, path)
    parts = tuple(path for path, _ in site.parts)
    return Target(site.mlx_path, site.hf_path, site.kind, r, alpha, scale, key, path, parts)


def _idle_target(path: str, plan: LoraPlan, dims: tuple[int, int]) -> Target:
    return Target("", path, "linear", *_scale(plan, path), path, path, idle=dims)


def _scale(plan: LoraPlan, path: str) -> tuple[int, float, float]:
    r = pattern_value(plan.rank_pattern, path, plan.r)
    alpha = pattern_value(plan.alpha_pattern, path, plan.lora_alpha)
    if not isinstance(r, int) or isinstance(r, bool) or r <= 0:
        raise AdapterError(f"r={r!r} for {path}", "a positive whole number", "LoraConfig(r=8)")
    return r, alpha, alpha / math.sqrt(r) if plan.use_rslora else alpha / r


def _no_match(sites: list[Site], plan: LoraPlan, selector: Selector, model_type: str) -> AdapterError:
    names = dict.fromkeys(s.hf_path.rsplit(".", 1)[-1] for s in sites if s.kind in ("linear", "embedding"))
    limits = {
        "exclude_modules": plan.exclude_modules,
        "modules_to_save": plan.modules_to_save,
        "layers_to_transform": plan.layers_to_transform,
    }
    given = "".join(f", {name}={value!r}" for name, value in limits.items() if value)
    shown = selector if isinstance(selector, str) else list(selector)
    return AdapterError(
        f"target_modules={shown!r}{given}, which match no module of the model",
        f"names among {', '.join(names)}",
        f"LoraConfig(target_modules={plain_names(sites, model_type)!r})"
        if model_type in REWRITTEN_NAMES
        else 'LoraConfig(target_modules="all-linear")',
    )


def _check_site(site: Site, model_type: str, plan: LoraPlan) -> None:
    leaf = site.hf_path.rsplit(".", 1)[-1]
    bypassed = BYPASSED_MODULES.get(model_type, ())
    if leaf in bypassed:
        raise AdapterError(
            f"target_modules matches {site.hf_path} of a {model_type} model",
            "modules that torch calls (it reads this weight past any adapter, and PEFT refuses it)",
            f"LoraConfig(..., exclude_modules={list(bypassed)!r})",
        )
    unwrapped = UNWRAPPED_MODULES.get(model_type, ())
    if leaf in unwrapped:
        raise AdapterError(
            f"target_modules matches {site.hf_path} of a {model_type} model",
            "modules whose forward PEFT's wrapper serves (with this one torch's own forward fails)",
            f"LoraConfig(..., exclude_modules={list(unwrapped)!r})",
        )
    if leaf in RENAMED_MODULES.get(model_type, ()):
        raise AdapterError(
            f"target_modules matches {site.hf_path}, which the torch model names differently",
            "modules of one name on both sides",
            "name the others: LoraConfig(target_modules=[...])",
        )
    lost = LOST_ON_LOADING.get(model_type)
    if lost in site.hf_path.split("."):
        raise AdapterError(
            f"target_modules matches {site.hf_path}, whose keys PEFT does not find again when it loads an adapter",
            "modules that PEFT loads",
            f'LoraConfig(..., exclude_modules=r".*{lost}.*")',
        )
    if site.kind in ("other", "router"):
        raise AdapterError(
            f"target_modules matches {site.hf_path}, a {type(site.module).__name__}",
            "Linear and Embedding layers",
            f'name the layers inside it, or leave it out: LoraConfig(..., exclude_modules=["{leaf}"])',
        )
    wrong = next((name for name in ("use_dora", "lora_bias") if getattr(plan, name)), None)
    if wrong and leaf in IDLE_MODULES.get(model_type, ()):
        raise AdapterError(
            f"{wrong}=True with {site.hf_path} among target_modules, whose weight torch reads past any adapter",
            f"{wrong} on layers that torch calls",
            f'LoraConfig(..., exclude_modules=["{leaf}"])',
        )
    if site.parts and wrong:
        raise AdapterError(
            f"{wrong}=True with {site.hf_path} among target_modules, which MLX holds in parts",
            f"{wrong} on layers that are one layer on both sides",
            f'LoraConfig(..., exclude_modules=["{leaf}"])',
        )


def _check_untied(chosen: list[Site], plan: LoraPlan, selector: Selector) -> None:
    head = next((h for h in HEADS if not is_all_linear(selector) and is_matched(plan, selector, h)), None)
    named = [site.hf_path for site in chosen if site.kind == "embedding"] + ([head] if head else [])
    if named:
        raise AdapterError(
            f"target_modules matches {named[0]}, which this model ties to its other end",
            "an embedding and a head with weights of their own (LoRA on one of a tied pair unties them)",
            f'LoraConfig(..., exclude_modules=["{named[0].rsplit(".", 1)[-1]}"])',
        )
