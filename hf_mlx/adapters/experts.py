"""Parameters that LoRA adapts: experts, which transformers 5 stacks, and their routers.

On the mixtures that were modules before, PEFT turns the names that the experts and the router had into
``target_parameters``, wherever in the model such a name stands.
Source: ``peft.utils.transformers_weight_conversion._convert_peft_config_moe`` and
``peft.tuners.tuners_utils.BaseTuner._inject_parameters`` (peft 0.21).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import mlx.core as mx

from ..errors import AdapterError
from ..settings.plan import LoraPlan
from .defaults import BYPASSED_MODULES, REWRITTEN_NAMES, TURNED_TYPES
from .matching import is_all_linear, is_matched
from .sites import HEADS, Site

_ROUTER = "gate"
_PAIR = "gate_up_proj"


def rewrite_names(sites: Iterable[Site], plan: LoraPlan, model_type: str) -> LoraPlan:
    """``plan`` as PEFT changes it on mixtures: names of experts and routers become ``target_parameters``.

    Gate and up projection are one parameter, with both their ranks: a pattern gives it twice the rank and alpha. A
    regex stands for the last names of all that it matches, in whichever layer. Any other type's plan stays as it is.

    Raises:
        AdapterError: One of gate and up projection without the other.
    """
    selector = plan.target_modules
    if model_type not in REWRITTEN_NAMES or selector is None:
        return plan
    names = _leaf_names(list(sites), plan, selector, model_type) if isinstance(selector, str) else selector
    if not names:
        return plan
    parameters = {name: _PAIR for name in REWRITTEN_NAMES[model_type][:2]}
    parameters |= {REWRITTEN_NAMES[model_type][2]: "down_proj", _ROUTER: "gate.weight"}
    found = {name: next((old for old in parameters if f".{name}".endswith(f".{old}")), None) for name in names}
    reached = {old for old in found.values() if old}
    missing = {old for old in parameters if parameters[old] == _PAIR} - reached
    if len(missing) == 1:
        present = next(old for old in reached if parameters[old] == _PAIR)
        raise AdapterError(
            f"target_modules with {present!r} but not {min(missing)!r}",
            f"both: PEFT holds them as one matrix, {_PAIR}",
            f"LoraConfig(target_modules=[..., {', '.join(map(repr, REWRITTEN_NAMES[model_type]))}])",
        )
    patterns = {} if missing else {rf".*\.{_PAIR}": 2}
    return dataclasses.replace(
        plan,
        target_modules=tuple(name for name, old in found.items() if old is None),
        target_parameters=tuple(
            dict.fromkeys([*(plan.target_parameters or ()), *sorted(parameters[old] for old in reached)])
        ),
        rank_pattern={**plan.rank_pattern, **{key: times * plan.r for key, times in patterns.items()}},
        alpha_pattern={**plan.alpha_pattern, **{key: times * plan.lora_alpha for key, times in patterns.items()}},
    )


def choose_parameters(
    sites: list[Site], plan: LoraPlan, modules: list[Site], model_type: str, *, restricted: bool
) -> list[tuple[Site, str]]:
    """What ``target_parameters`` reaches, with the module under which PEFT keeps each pair.

    PEFT nests the wrappers of one module's parameters, the first parameter innermost.

    Args:
        sites: Every module and stack of the model, in HF order.
        plan: As :func:`rewrite_names` gives it.
        modules: What ``target_modules`` reaches.
        model_type: The HF config's model type.
        restricted: Only some decoder blocks are to be adapted.

    Raises:
        AdapterError: A setting that PEFT has no room for on parameters, or a parameter that cannot carry LoRA here.
    """
    wanted = plan.target_parameters or ()
    reached = (s for s in sites if any(f".{s.parameter}".endswith(f".{name}") for name in wanted))
    # A module of MLX's own around a router has the router's path, and no weight.
    chosen = [site for site in reached if isinstance(site.module.get("weight"), mx.array)]
    if not chosen:
        # Names that PEFT makes of its own may match nothing; of those that a script gives it warns.
        if wanted and model_type not in REWRITTEN_NAMES:
            stacks = [site.parameter.split(".", 3)[-1] for site in sites if site.kind in ("experts", "router")]
            raise AdapterError(
                f"target_parameters={list(wanted)!r}, which match no parameter of the model",
                f"names among {', '.join(dict.fromkeys(stacks)) or 'the weights of its Linear layers'}",
                'LoraConfig(target_modules="all-linear")',
            )
        return []
    _check_settings(plan, restricted=restricted)
    twice = next((site for site in chosen if site in modules), None)
    if twice is not None:
        raise AdapterError(
            f"target_parameters matches {twice.parameter}, whose module target_modules adapts too",
            "each layer in one of the two",
            f'LoraConfig(..., exclude_modules=["{twice.hf_path.rsplit(".", 1)[-1]}"])',
        )
    for site in chosen:
        if site.kind not in ("linear", "experts", "router"):
            raise AdapterError(
                f"target_parameters matches {site.parameter}, of a {type(site.module).__name__}",
                "weights of Linear layers, of routers, and stacks of experts",
                "leave it out of target_parameters",
            )
        if site.kind == "experts" and model_type in TURNED_TYPES:
            raise AdapterError(
                f"target_parameters matches {site.parameter} of a {model_type} model",
                "stacks that PEFT reads the right way round (here it gives A the outputs, and B the inputs)",
                'LoraConfig(target_modules="all-linear", exclude_modules=["router"])',
            )
    holders = [site.parameter.rpartition(".")[0] for site in chosen]
    outer = [holders[i + 1 :].count(holder) for i, holder in enumerate(holders)]
    return [(site, holder + ".base_layer" * n) for site, holder, n in zip(chosen, holders, outer, strict=True)]


def plain_names(sites: Iterable[Site], model_type: str) -> list[str]:
    """Last names of the layers that are Linear on both sides and that PEFT leaves where they are."""
    sites = list(sites)
    barred = {*BYPASSED_MODULES.get(model_type, ()), *HEADS, *REWRITTEN_NAMES.get(model_type, ()), _ROUTER}
    plain = {s.hf_path.rsplit(".", 1)[-1]: None for s in sites if s.kind == "linear"}
    other = {s.hf_path.rsplit(".", 1)[-1] for s in sites if s.kind != "linear"}
    return [name for name in plain if name not in barred | other]


def _check_settings(plan: LoraPlan, *, restricted: bool) -> None:
    # PEFT raises on the first four; a decoder block cannot be said of a parameter.
    settings = {
        "lora_dropout": plan.lora_dropout,
        "use_dora": plan.use_dora,
        "lora_bias": plan.lora_bias,
        "fan_in_fan_out": plan.fan_in_fan_out,
        "init_lora_weights": plan.init_lora_weights if isinstance(plan.init_lora_weights, str) else None,
    }
    if plan.init_lora_weights == "gaussian":
        del settings["init_lora_weights"]
    wrong = next((f"{name}={value!r}" for name, value in settings.items() if value), None)
    if restricted:
        wrong = "finetune_last_n_layers"
    if wrong:
        raise AdapterError(
            f"{wrong} with experts or their router among the targets, which PEFT adapts as parameters",
            "none of it: PEFT cannot express it for parameters",
            'leave it out, or LoraConfig(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])',
        )


def _leaf_names(sites: list[Site], plan: LoraPlan, selector: str, model_type: str) -> tuple[str, ...]:
    """The last names that PEFT resolves a string to, where it rewrites any."""
    old = (_ROUTER, *REWRITTEN_NAMES[model_type])
    if is_all_linear(selector):
        linear = (s.hf_path for s in sites if s.kind == "linear" and s.hf_path.rsplit(".", 1)[-1] not in HEADS)
        return tuple(dict.fromkeys([*(path.rsplit(".", 1)[-1] for path in linear), *old]))
    found = {site.hf_path.rsplit(".", 1)[-1] for site in sites if is_matched(plan, selector, site.hf_path)}
    # PEFT asks for each expert's name under the module that holds the stack, without an index.
    stacks = {site.hf_path.rpartition(".")[0] for site in sites if site.kind == "experts"}
    found |= {name for name in old[1:] if any(is_matched(plan, selector, f"{stack}.{name}") for stack in stacks)}
    return tuple(sorted(found))
