"""Pairs that PEFT wraps around layers which no token reaches: drawn, saved and never trained.

A vision tower beside text alone, and Linear layers whose weight torch reads past the wrapper: their pairs get no
gradient, so torch's optimizers leave them where they started.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ..errors import AdapterError
from ..models.skeleton import build_skeleton, has_skeletons
from ..settings.plan import LoraPlan
from .matching import Selector, is_all_linear, is_excluded, is_matched

if TYPE_CHECKING:
    from ..models.load import LoadedModel
    from .sites import Site
    from .targets import Target


class IdlePair:
    """One such pair.

    Args:
        target: What it is wrapped around.

    Attributes:
        lora_A: (r, in), fp32.
        lora_B: (out, r), fp32.
    """

    def __init__(self, target: Target) -> None:
        inputs, outputs = target.idle or (0, 0)
        self.key, self.r = target.key, target.r
        self.lora_A = mx.zeros((target.r, inputs))
        self.lora_B = mx.zeros((outputs, target.r))

    def tensors(self) -> dict[str, mx.array]:
        """By PEFT key."""
        return {f"base_model.model.{self.key}.{leaf}.weight": getattr(self, leaf) for leaf in ("lora_A", "lora_B")}


class Tower:
    """The modules of the torch model that MLX does not load.

    Attributes:
        order: HF path → its place among the torch model's modules; empty where all of it is loaded.
        linear: HF path → (in, out) of the Linear layers that are not.
        others: HF paths of the other modules that hold a weight and are not.
    """

    def __init__(self, loaded: LoadedModel, sites: list[Site]) -> None:
        self.order: dict[str, int] = {}
        self.linear: dict[str, tuple[int, int]] = {}
        self.others: list[str] = []
        absent = {name.rsplit(".", 1)[0] for name in loaded.names.untouched if name.endswith(".weight")}
        if not absent:
            return
        known = {site.hf_path for site in sites}
        if not has_skeletons():
            self.others = sorted(absent)
            return
        import torch

        skeleton = build_skeleton(loaded.config)
        head = skeleton.get_output_embeddings()
        for place, (path, module) in enumerate(skeleton.named_modules()):
            self.order[path] = place
            if path in known or not any(True for _ in module.parameters(recurse=False)) or module is head:
                continue
            if isinstance(module, torch.nn.Linear):
                self.linear[path] = (module.in_features, module.out_features)
            else:
                self.others.append(path)

    def choose(self, plan: LoraPlan, selector: Selector) -> list[str]:
        """The Linear layers that ``target_modules`` reaches, by HF path.

        Raises:
            AdapterError: It reaches something else, or a setting that changes these layers' weights.
        """
        if is_all_linear(selector):
            chosen = [path for path in self.linear if not is_excluded(plan, path)]
            # Without the skeleton nobody knows which of them are Linear.
            reached = [] if self.order else [path for path in self.others if not is_excluded(plan, path)]
        else:
            chosen = [path for path in self.linear if is_matched(plan, selector, path)]
            reached = [path for path in self.others if is_matched(plan, selector, path)]
        settings: dict[str, Any] = {"use_dora": plan.use_dora, "lora_bias": plan.lora_bias}
        settings["init_lora_weights"] = plan.init_lora_weights in ("pissa", "olora")
        settings["bias"] = plan.bias != "none"
        wrong = next((f" with {name}={getattr(plan, name)!r}" for name, on in settings.items() if on), "")
        if reached or (chosen and wrong):
            path = (reached or chosen)[0]
            raise AdapterError(
                f"target_modules{wrong if chosen else ''} matches {path}, which MLX does not load",
                "modules of the language model" + ("" if self.order else " (torch, which knows the others, is absent)"),
                f'LoraConfig(..., exclude_modules=r".*({"|".join(_stems([*reached, *chosen]))}).*")',
            )
        return chosen


def _stems(paths: list[str]) -> list[str]:
    return sorted({next(part for part in path.split(".") if part != "model") for path in paths})
