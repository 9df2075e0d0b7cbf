"""What a LoraConfig means on a given model, decided before the model is touched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx

from ..errors import AdapterError
from ..settings.plan import LoraPlan
from .decomposed import check_decomposed, limit_ranks
from .defaults import CONV1D_TYPES, RENAMED_MODULES
from .experts import rewrite_names
from .idle import Tower
from .layers import LoRAEmbedding, LoRALinear
from .matching import Selector, is_all_linear, minimal_names
from .parts import LoRARouter, LoRASwitchLinear
from .score_head import SAVED_HEADS, SEQ_CLS
from .sites import HEADS, Site, is_tied, layer_count, list_sites
from .targets import Target, resolve_selector, select_targets
from .token_rows import TokenRows, TrainableTokens, choose_rows

if TYPE_CHECKING:
    from ..models.load import LoadedModel

_LAYERS = (LoRALinear, LoRAEmbedding, LoRASwitchLinear, LoRARouter, TrainableTokens)


@dataclass(frozen=True)
class Blueprint:
    """The modules of one model that one LoraConfig trains.

    Attributes:
        sites: Every module of the model, in HF order.
        wrapped: Those that PEFT wraps, in the order in which it does.
        saved: Those trained in full.
        biased: Those whose bias is trained.
        rows: Single rows of embedding and head that are trained.
        plan: The LoraConfig, names as PEFT rewrites them.
        selector: ``target_modules`` as it is to be written to adapter_config.json.
    """

    sites: tuple[Site, ...]
    wrapped: tuple[Target, ...]
    saved: tuple[Site, ...]
    biased: tuple[Site, ...]
    selector: Selector
    plan: LoraPlan
    rows: tuple[TokenRows, ...] = ()

    @property
    def targets(self) -> tuple[Target, ...]:
        """Those that get LoRA layers."""
        return tuple(target for target in self.wrapped if not target.idle)

    @property
    def idle(self) -> tuple[Target, ...]:
        """Those whose pair is only drawn and saved."""
        return tuple(target for target in self.wrapped if target.idle)


def draw_blueprint(loaded: LoadedModel, plan: LoraPlan, last_n_layers: int | None = None) -> Blueprint:
    """Decide what ``plan`` trains on ``loaded``; the model stays as it is.

    Raises:
        AdapterError: Nothing matches, a module cannot be adapted, or settings contradict each other.
    """
    sites = list_sites(loaded)
    if any(isinstance(site.module, _LAYERS) for site in sites):
        raise AdapterError(
            "a model that already carries an adapter", "a plain base model", "load the base again, or merge first"
        )
    plan = rewrite_names(sites, plan, loaded.model_type)
    tied = is_tied(loaded)
    layers = _last_layers(loaded, last_n_layers)
    tower = Tower(loaded, sites)
    wrapped = select_targets(sites, plan, loaded.model_type, tied=tied, layers=layers, tower=tower)
    wrapped = limit_ranks(plan, sites, wrapped)
    targets = [target for target in wrapped if not target.idle]
    check_decomposed(plan, sites, targets, conv1d=loaded.model_type in CONV1D_TYPES)
    for target in targets:
        _check_embedding(target, plan)
    saved = _saved_sites(sites, plan, loaded.model_type, targets, tied=tied)
    return Blueprint(
        sites=tuple(sites),
        wrapped=tuple(wrapped),
        saved=tuple(saved),
        biased=tuple(_biased_sites(sites, targets, saved, plan)),
        selector=_written_selector(sites, plan, loaded.model_type, wrapped, tower, restricted=layers is not None),
        plan=plan,
        rows=tuple(choose_rows(sites, plan, targets, saved, tied=tied)),
    )


def _check_embedding(target: Target, plan: LoraPlan) -> None:
    wrong = "use_dora" if plan.use_dora else "lora_bias" if plan.lora_bias else None
    if wrong and target.kind == "embedding":
        raise AdapterError(
            f"{wrong}=True with the embedding {target.hf_path} among target_modules",
            f"{wrong} on Linear layers only",
            f'LoraConfig(..., exclude_modules=["{target.hf_path.rsplit(".", 1)[-1]}"])',
        )


def _last_layers(loaded: LoadedModel, last_n_layers: int | None) -> range | None:
    if last_n_layers is None:
        return None
    count = layer_count(loaded)
    if not 0 < last_n_layers <= count:
        raise AdapterError(
            f"finetune_last_n_layers={last_n_layers}", f"1 to {count}, the model's layers", "finetune_last_n_layers=1"
        )
    return range(count - last_n_layers, count)


def _saved_sites(
    sites: list[Site], plan: LoraPlan, model_type: str, targets: list[Target], *, tied: bool
) -> list[Site]:
    saved = []
    names = plan.modules_to_save or ()
    spelled = is_spelled(names)
    for name in names:
        # PEFT compares with str.endswith, dot or no dot (peft.utils.other._set_trainable).
        matched = [site for site in sites if site.kind != "experts" and site.hf_path.endswith(name)]
        if not matched and not spelled and not (plan.task_type == SEQ_CLS and name in SAVED_HEADS[:1]):
            leaves = sorted({site.hf_path.rsplit(".", 1)[-1] for site in sites} - {str(i) for i in range(1000)})
            raise AdapterError(
                f"modules_to_save names {name!r}, which matches no module"
                + (" (the head is the embedding)" if tied and name in HEADS else ""),
                f"names among {', '.join(leaves)}",
                "LoraConfig(..., modules_to_save=None)",
            )
        saved += [site for site in matched if site not in saved]
    for site in saved:
        renamed = RENAMED_MODULES.get(model_type, ())
        kept = plan.ensure_weight_tying
        _check_saved(site, sites, targets, tied=tied, kept_tied=kept, renamed=renamed, spelled=spelled)
    if spelled:
        _check_spelled(saved, names)
    return saved


def is_spelled(names: tuple[str, ...]) -> bool:
    """Whether ``modules_to_save`` was one string, which PEFT reads letter by letter."""
    return bool(names) and all(len(name) == 1 for name in names)


def _check_spelled(saved: list[Site], names: tuple[str, ...]) -> None:
    paths = [site.mlx_path for site in saved]
    nested = next((site for site in saved if any(site.mlx_path.startswith(f"{path}.") for path in paths)), None)
    if nested is not None:
        raise AdapterError(
            f"modules_to_save={''.join(names)!r}, a string: PEFT reads it letter by letter, and both {nested.hf_path} "
            "and a module around it end with one of them",
            "a list of names",
            "LoraConfig(..., modules_to_save=[...]) with brackets around the name",
        )


def _check_saved(
    site: Site,
    sites: list[Site],
    targets: list[Target],
    *,
    tied: bool,
    kept_tied: bool,
    renamed: tuple[str, ...],
    spelled: bool,
) -> None:
    below = [s for s in sites if s.mlx_path == site.mlx_path or s.mlx_path.startswith(f"{site.mlx_path}.")]
    paths = {s.mlx_path for s in below}
    problem = None
    if tied and site.kind == "embedding" and not kept_tied:
        problem = "which this model ties to its head", "an embedding and a head with weights of their own"
    elif any(s.hf_path.rsplit(".", 1)[-1] in renamed for s in below):
        problem = "which has another name in the torch model", "modules of one name"
    elif any("scales" in s.module for s in below):
        problem = "which is quantised", "modules in floating point, since all their weights are trained"
    elif any(s.kind == "experts" or s.parts for s in below):
        problem = "which holds experts or parts of a fused layer", "modules with one tensor on each side"
    elif any(t.mlx_path in paths for t in targets):
        problem = "which target_modules adapts too", "each module in one of the two"
    if problem:
        leaf = site.hf_path.rsplit(".", 1)[-1]
        raise AdapterError(
            (
                "modules_to_save is a string, which PEFT reads letter by letter, and so "
                if spelled
                else "modules_to_save "
            )
            + f"matches {site.hf_path}, {problem[0]}",
            "a list of names" if spelled else problem[1],
            'LoraConfig(..., modules_to_save=["lm_head"]), with brackets around the name'
            if spelled
            else f"leave {leaf!r} out of modules_to_save",
        )


def _biased_sites(sites: list[Site], targets: list[Target], saved: list[Site], plan: LoraPlan) -> list[Site]:
    if plan.bias == "none":
        return []
    adapted = {target.mlx_path for target in targets}
    below_saved = tuple(f"{site.mlx_path}." for site in saved)
    biased = [site for site in sites if isinstance(site.module.get("bias"), mx.array)]
    if plan.bias == "lora_only":
        biased = [site for site in biased if site.mlx_path in adapted]
    for site in biased:
        in_saved = bool(below_saved) and f"{site.mlx_path}.".startswith(below_saved)
        problem = (
            "in modules_to_save"
            if in_saved
            else "quantised"
            if "scales" in site.module
            else "held in parts"
            if site.parts or site.kind == "experts"
            else None
        )
        if problem:
            raise AdapterError(
                f'bias="{plan.bias}" with the bias of {site.hf_path}, which is {problem}',
                "biases of plain layers outside modules_to_save",
                'LoraConfig(..., bias="none")',
            )
    return biased


def _written_selector(
    sites: list[Site], plan: LoraPlan, model_type: str, targets: list[Target], tower: Tower, *, restricted: bool
) -> Selector:
    """``target_modules`` for adapter_config.json: as given where PEFT reads it the same, else written out."""
    selector = resolve_selector(plan, model_type)
    if not is_all_linear(selector) and not restricted:
        return selector
    modules = [t.hf_path for t in targets if t.kind in ("linear", "embedding")]
    others = [s.hf_path for s in sites if s.kind != "experts"]
    return tuple(minimal_names(modules, [*others, *tower.order, *tower.others]))
