"""Which modules a LoraConfig adapts, by PEFT's own matching rules.

Source: ``peft.tuners.tuners_utils.check_target_module_exists`` and ``get_pattern_key`` (peft 0.21).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import AdapterError
from ..settings.plan import LoraPlan
from .defaults import BYPASSED_MODULES, EXPERT_NAMES, LOST_ON_LOADING, RENAMED_MODULES, TARGET_MODULES
from .sites import HEADS, Kind, Site

Selector = tuple[str, ...] | str


@dataclass(frozen=True)
class Target:
    """One adapted module: where it is, its rank, its alpha and the resulting scale."""

    mlx_path: str
    hf_path: str
    kind: Kind
    r: int
    alpha: float
    scale: float


def resolve_selector(plan: LoraPlan, model_type: str) -> Selector:
    """``target_modules`` with None replaced by PEFT's default for the architecture.

    Raises:
        AdapterError: PEFT has no default for this model type, or the list is empty.
    """
    selector = plan.target_modules
    if selector is None:
        selector = TARGET_MODULES.get(model_type)
        if selector is None:
            raise AdapterError(
                f"target_modules=None for model type {model_type!r}",
                "a model type for which PEFT has a default",
                'LoraConfig(target_modules="all-linear")',
            )
    if not selector:
        raise AdapterError(
            f"target_modules={plan.target_modules!r}",
            "at least one module to adapt",
            'LoraConfig(target_modules="all-linear")',
        )
    return selector


def select_targets(
    sites: Iterable[Site], plan: LoraPlan, model_type: str, *, tied: bool, layers: range | None = None
) -> list[Target]:
    """The modules to adapt, in HF order.

    Args:
        sites: Every module of the model, in HF order.
        plan: The LoraConfig as plain values.
        model_type: The HF config's model type.
        tied: The head is the embedding.
        layers: Restrict to these decoder blocks, counted from 0.

    Raises:
        AdapterError: Nothing matches, a match cannot carry LoRA, or a rank is not positive.
    """
    sites = list(sites)
    selector = resolve_selector(plan, model_type)
    chosen = _choose(sites, plan, selector, model_type)
    if layers is not None:
        chosen = [site for site in chosen if _layer_index(site.mlx_path, None) in layers]
    if not chosen:
        raise _no_match(sites, plan, selector)
    for site in chosen:
        _check_site(site, model_type)
    if tied:
        _check_untied(chosen, plan, selector)
    if any(site.kind == "experts" for site in chosen):
        _check_experts(plan, model_type, chosen, restricted=layers is not None)
    return [_target(site, plan) for site in chosen]


def is_matched(plan: LoraPlan, selector: Selector, path: str) -> bool:
    """Whether PEFT would adapt the module at this HF path, judging by its name alone."""
    if is_excluded(plan, path):
        return False
    if isinstance(selector, str):
        return re.fullmatch(selector, path) is not None
    if path in selector:
        return True
    if not any(path.endswith(f".{name}") for name in selector):
        return False
    if not plan.layers_to_transform:
        return True
    return _layer_index(path, plan.layers_pattern) in plan.layers_to_transform


def pattern_value(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first pattern that matches ``(.*\\.)?(pattern)$``, else the default."""
    return next((v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), default)


def idle_patterns(plan: LoraPlan, paths: Iterable[str]) -> list[str]:
    """``rank_pattern`` and ``alpha_pattern`` entries that match none of these module paths; PEFT is silent there."""
    paths = list(paths)
    return [
        f"{name}={{{key!r}: {value!r}}}"
        for name in ("rank_pattern", "alpha_pattern")
        for key, value in getattr(plan, name).items()
        if not any(re.match(rf"(.*\.)?({key})$", path) for path in paths)
    ]


def minimal_names(targets: Iterable[str], paths: Iterable[str]) -> list[str]:
    """The shortest list that, matched by suffix, selects exactly these modules.

    A module whose last name stands for nothing else is written by that name, any other in full.
    """
    targets = list(targets)
    others = {path.rsplit(".", 1)[-1] for path in set(paths) - set(targets)}
    names = (path.rsplit(".", 1)[-1] if path.rsplit(".", 1)[-1] not in others else path for path in targets)
    return list(dict.fromkeys(names))


def is_all_linear(selector: Selector) -> bool:
    """Whether this is PEFT's shorthand for every Linear layer but the head."""
    return isinstance(selector, str) and selector.lower() == "all-linear"


def _choose(sites: list[Site], plan: LoraPlan, selector: Selector, model_type: str) -> list[Site]:
    everything = is_all_linear(selector)
    if model_type in EXPERT_NAMES and any(site.kind == "experts" for site in sites):
        if everything:
            linear = {s.hf_path.rsplit(".", 1)[-1] for s in sites if s.kind == "linear" and not _is_head(s)}
            selector = tuple(sorted(linear | {"gate", *EXPERT_NAMES[model_type]}))
        elif isinstance(selector, str):
            _refuse_expert_regex(sites, plan, selector)
            return [site for site in sites if is_matched(plan, selector, site.hf_path)]
        return _choose_with_experts(sites, plan, selector, EXPERT_NAMES[model_type])
    # Elsewhere the experts of transformers 5 are parameters, which no name in target_modules reaches.
    sites = [site for site in sites if site.kind != "experts"]
    if everything:
        linear = [site for site in sites if site.kind == "linear" and not _is_head(site)]
        return [site for site in linear if not is_excluded(plan, site.hf_path)]
    return [site for site in sites if is_matched(plan, selector, site.hf_path)]


def _choose_with_experts(
    sites: list[Site], plan: LoraPlan, selector: tuple[str, ...], expert_names: tuple[str, ...]
) -> list[Site]:
    # PEFT turns the expert names (and the router's) into parameters of the fused experts, wherever they
    # stand; a dense projection of the same name (a shared expert's) is then no longer matched.
    converted = ("gate", *expert_names)
    moved = {name for entry in selector for name in converted if entry == name or entry.endswith(f".{name}")}
    kept = tuple(entry for entry in selector if not any(entry == n or entry.endswith(f".{n}") for n in converted))
    modules, parameters = [], []
    for site in sites:
        leaf = site.hf_path.rsplit(".", 1)[-1]
        if leaf in moved and (site.kind == "experts" or leaf == "gate"):
            parameters.append(site)
        elif site.kind != "experts" and is_matched(plan, kept, site.hf_path):
            modules.append(site)
    # PEFT wraps (and draws first values for) all modules before any parameter.
    return modules + parameters


def _refuse_expert_regex(sites: list[Site], plan: LoraPlan, selector: str) -> None:
    if any(site.kind == "experts" and is_matched(plan, selector, site.hf_path) for site in sites):
        raise AdapterError(
            f"target_modules={selector!r}, which matches experts",
            "experts named in a list (PEFT rewrites a pattern that reaches them)",
            'LoraConfig(target_modules=["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"])',
        )


def _is_head(site: Site) -> bool:
    return site.hf_path.rsplit(".", 1)[-1] in HEADS


def is_excluded(plan: LoraPlan, path: str) -> bool:
    """Whether PEFT leaves this module out, for ``exclude_modules`` or because it is trained in full."""
    excluded = plan.exclude_modules
    if isinstance(excluded, str) and excluded:
        if re.fullmatch(excluded, path):
            return True
    elif excluded and (path in excluded or any(path.endswith(f".{name}") for name in excluded)):
        return True
    return any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in plan.modules_to_save or ())


def _layer_index(path: str, patterns: tuple[str, ...] | None) -> int | None:
    forms = [rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\." for p in patterns] if patterns else [r".*?\.[^.]*\.(?P<idx>\d+)\."]
    match = next((m for form in forms if (m := re.match(form, path))), None)
    return int(match["idx"]) if match else None


def _target(site: Site, plan: LoraPlan) -> Target:
    r = pattern_value(plan.rank_pattern, site.hf_path, plan.r)
    alpha = pattern_value(plan.alpha_pattern, site.hf_path, plan.lora_alpha)
    if not isinstance(r, int) or isinstance(r, bool) or r <= 0:
        raise AdapterError(f"r={r!r} for {site.hf_path}", "a positive whole number", "LoraConfig(r=8)")
    scale = alpha / math.sqrt(r) if plan.use_rslora else alpha / r
    return Target(site.mlx_path, site.hf_path, site.kind, r, alpha, scale)


def _no_match(sites: list[Site], plan: LoraPlan, selector: Selector) -> AdapterError:
    names = dict.fromkeys(s.hf_path.rsplit(".", 1)[-1] for s in sites if s.kind != "other")
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
        'LoraConfig(target_modules="all-linear")',
    )


def _check_site(site: Site, model_type: str) -> None:
    leaf = site.hf_path.rsplit(".", 1)[-1]
    bypassed = BYPASSED_MODULES.get(model_type, ())
    if leaf in bypassed:
        raise AdapterError(
            f"target_modules matches {site.hf_path} of a {model_type} model",
            "modules that torch calls (it reads this weight past any adapter)",
            f"LoraConfig(..., exclude_modules={list(bypassed)!r})",
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
    if site.kind == "other":
        raise AdapterError(
            f"target_modules matches {site.hf_path}, a {type(site.module).__name__}",
            "Linear, Embedding or expert layers",
            f'name the layers inside it, or leave it out: LoraConfig(..., exclude_modules=["{leaf}"])',
        )
    if site.shared:
        raise AdapterError(
            f"target_modules matches {site.hf_path}, which MLX holds in parts",
            "layers that are one layer on both sides, so that the adapter fits both",
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


def _check_experts(plan: LoraPlan, model_type: str, chosen: list[Site], *, restricted: bool) -> None:
    names = EXPERT_NAMES[model_type]
    leaves = {site.hf_path.rsplit(".", 1)[-1] for site in chosen if site.kind == "experts"}
    pair = set(names[:2])
    if leaves & pair and not pair <= leaves:
        raise AdapterError(
            f"target_modules with {sorted(leaves & pair)} but not {sorted(pair - leaves)}",
            f"both of {sorted(pair)}: PEFT holds them as one matrix",
            f"LoraConfig(target_modules=[..., {', '.join(map(repr, names))}])",
        )
    # PEFT's fused form has one rank and one alpha for all experts of all layers, and no room for the rest.
    settings = {
        "lora_dropout": plan.lora_dropout,
        "use_dora": plan.use_dora,
        "lora_bias": plan.lora_bias,
        "use_rslora": plan.use_rslora,
        "rank_pattern": plan.rank_pattern,
        "alpha_pattern": plan.alpha_pattern,
        "exclude_modules": plan.exclude_modules,
        "layers_to_transform": plan.layers_to_transform,
    }
    wrong = next((f"{name}={value!r}" for name, value in settings.items() if value), None)
    if restricted:
        wrong = "finetune_last_n_layers"
    if wrong:
        raise AdapterError(
            f"{wrong} with experts among target_modules",
            "none of it: PEFT cannot express it for fused experts",
            'leave it out, or LoraConfig(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])',
        )
