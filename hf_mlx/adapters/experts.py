"""What ``target_modules`` means on mixtures of experts whose layers PEFT 0.21 rewrites.

transformers 5 holds the experts of a block as two parameters and the router's weight as a third. PEFT turns the
names that these had before into ``target_parameters``, wherever in the model such a name stands.
Source: ``peft.utils.transformers_weight_conversion._convert_peft_config_moe``.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import AdapterError
from ..settings.plan import LoraPlan
from .defaults import BYPASSED_MODULES, EXPERT_NAMES, REWRITTEN_NAMES
from .matching import Selector, is_all_linear, is_matched
from .sites import HEADS, Site

_ROUTER = "gate"


def check_selector(sites: Iterable[Site], plan: LoraPlan, selector: Selector, model_type: str) -> None:
    """Refuse what PEFT rewrites into parameters that have no layer of the same kind here.

    Raises:
        AdapterError: ``"all-linear"``, a regex that reaches a rewritten name, or experts that MLX holds otherwise.
    """
    sites = list(sites)
    if model_type not in REWRITTEN_NAMES:
        return
    remedy = f"LoraConfig(..., target_modules={plain_names(sites, model_type)!r})"
    if is_all_linear(selector):
        raise AdapterError(
            f'target_modules="all-linear" on a {model_type} model, where PEFT adapts the routers and the fused experts '
            "(gate_up_proj, down_proj) as parameters",
            "layers that are Linear on both sides, by name",
            remedy,
        )
    reached = _rewritten(_leaf_names(sites, plan, selector, model_type), model_type)
    names, pair = REWRITTEN_NAMES[model_type], set(REWRITTEN_NAMES[model_type][:2])
    if isinstance(selector, str) and reached - {_ROUTER}:
        raise AdapterError(
            f"target_modules={selector!r}, which matches {sorted(reached)}: PEFT makes all experts of such a pattern",
            "a pattern without the experts' names, or a list",
            remedy,
        )
    if reached and (model_type not in EXPERT_NAMES or _has_own_router(sites, reached)):
        raise AdapterError(
            f"target_modules with {sorted(reached)} on a {model_type} model, which PEFT adapts as parameters and MLX "
            "holds in another form",
            "layers that are Linear on both sides, by name",
            remedy,
        )
    if reached & pair and not pair <= reached:
        raise AdapterError(
            f"target_modules with {sorted(reached & pair)} but not {sorted(pair - reached)}",
            f"both of {sorted(pair)}: PEFT holds them as one matrix",
            f"LoraConfig(target_modules=[..., {', '.join(map(repr, names))}])",
        )


def choose_sites(sites: list[Site], plan: LoraPlan, selector: Selector, model_type: str) -> list[Site]:
    """The modules that PEFT adapts on a type whose names it rewrites: modules first, then parameters.

    A regex stands for the last names of all that it matches, in whichever layer: PEFT reduces it to these.
    """
    names = _leaf_names(sites, plan, selector, model_type)
    moved = _rewritten(names, model_type)
    kept = tuple(name for name in names if not _moves(name, model_type))
    modules, parameters = [], []
    for site in sites:
        leaf = site.hf_path.rsplit(".", 1)[-1]
        if leaf in moved and _is_parameter(site):
            parameters.append(site)
        elif site.kind != "experts" and is_matched(plan, kept, site.hf_path):
            modules.append(site)
    # PEFT wraps (and draws first values for) all modules before any parameter.
    return modules + parameters


def plain_names(sites: Iterable[Site], model_type: str) -> list[str]:
    """Last names of the layers that are Linear on both sides and that PEFT leaves where they are."""
    sites = list(sites)
    barred = {*BYPASSED_MODULES.get(model_type, ()), *HEADS}
    plain = {s.hf_path.rsplit(".", 1)[-1]: None for s in sites if s.kind == "linear" and not s.shared}
    other = {s.hf_path.rsplit(".", 1)[-1] for s in sites if s.kind != "linear" or s.shared}
    return [name for name in plain if name not in barred | other and not _moves(name, model_type)]


def check_parameters(plan: LoraPlan, model_type: str, chosen: list[Site], *, restricted: bool) -> None:
    """Refuse settings that PEFT has no room for where it adapts parameters: experts and their routers.

    Raises:
        AdapterError: A setting of single layers.
    """
    if model_type not in REWRITTEN_NAMES or not any(_is_parameter(site) for site in chosen):
        return
    # One rank and one alpha for a parameter of all layers, and no room for the rest.
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
            f"{wrong} with experts or their router among target_modules",
            "none of it: PEFT cannot express it for parameters",
            'leave it out, or LoraConfig(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])',
        )


def _leaf_names(sites: list[Site], plan: LoraPlan, selector: Selector, model_type: str) -> tuple[str, ...]:
    if not isinstance(selector, str):
        return selector
    found = {site.hf_path.rsplit(".", 1)[-1] for site in sites if is_matched(plan, selector, site.hf_path)}
    # PEFT asks for each expert's name under the block that holds all of them, without an index.
    blocks = {site.hf_path.rsplit(".", 2)[0] for site in sites if site.kind == "experts"}
    for name in REWRITTEN_NAMES[model_type]:
        if any(is_matched(plan, selector, f"{block}.{name}") for block in blocks):
            found.add(name)
    return tuple(sorted(found))


def _is_parameter(site: Site) -> bool:
    return site.kind == "experts" or site.hf_path.rsplit(".", 1)[-1] == _ROUTER


def _has_own_router(sites: list[Site], reached: set[str]) -> bool:
    routers = [site for site in sites if site.hf_path.rsplit(".", 1)[-1] == _ROUTER]
    return _ROUTER in reached and any(site.kind != "linear" for site in routers)


def _moves(name: str, model_type: str) -> bool:
    return any(name == old or name.endswith(f".{old}") for old in (_ROUTER, *REWRITTEN_NAMES[model_type]))


def _rewritten(names: Iterable[str], model_type: str) -> set[str]:
    old = (_ROUTER, *REWRITTEN_NAMES[model_type])
    return {o for o in old for name in names if name == o or name.endswith(f".{o}")}
