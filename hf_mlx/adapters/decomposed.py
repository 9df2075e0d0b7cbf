"""Starts that PEFT takes out of the base: PiSSA and OLoRA, which leave the rest of each weight as the new base.

Both follow from the weights alone, so whoever reads such an adapter takes the same share out of the base again, as
PEFT does. Source: peft 0.21 ``LoraLayer.pissa_init`` and ``olora_init``. Singular vectors are known up to a common sign
of a row of A and a column of B, which changes neither their product nor, mirrored, any step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import AdapterError
from ..settings.plan import LoraPlan
from .layers import DoRALinear, LoRALinear
from .sites import Site
from .targets import Target

KINDS = ("pissa", "olora")


def take_out(layers: Iterable[Any], kind: str) -> None:
    """Give each Linear's leading part to its adapter, and the base the rest, in the base's dtype.

    Args:
        layers: Those of an adapter; embeddings start as ever, as in PEFT.
        kind: One of :data:`KINDS`.
    """
    for layer in layers:
        if not isinstance(layer, LoRALinear):
            continue
        held = layer.base_layer.weight
        weight = np.array(held.astype(mx.float32))
        a, b = (_pissa if kind == "pissa" else _olora)(weight, layer.lora_A.shape[0], layer.scale)
        layer.lora_A, layer.lora_B = mx.array(a), mx.array(b)
        layer.base_layer.weight = mx.array(weight - np.float32(layer.scale) * (b @ a)).astype(held.dtype)
        if isinstance(layer, DoRALinear):
            layer.reset_magnitude()


def limit_ranks(plan: LoraPlan, sites: Iterable[Site], targets: Iterable[Target]) -> list[Target]:
    """``targets`` with no more ranks than a weight has singular vectors; the factor stays that of the configured rank.

    Source: peft 0.21 ``pissa_init`` and ``olora_init``, which cut what there is.
    """
    if plan.init_lora_weights not in KINDS:
        return list(targets)
    modules: dict[str, Any] = {site.mlx_path: site.module for site in sites}
    return [
        replace(target, r=min(target.r, *modules[target.mlx_path].weight.shape))
        if target.kind == "linear" and not target.idle and not target.parts
        else target
        for target in targets
    ]


def check_decomposed(plan: LoraPlan, sites: Iterable[Site], targets: Iterable[Target], *, conv1d: bool) -> None:
    """Refuse layers that PEFT does not decompose.

    Raises:
        AdapterError: Quantised, stacked or divided weights, or transposed ones under OLoRA.
    """
    kind = plan.init_lora_weights
    if kind not in KINDS:
        return
    modules = {site.mlx_path: site.module for site in sites}
    for target in targets:
        module, problem = modules[target.mlx_path], None
        if target.kind == "experts":
            problem = "which holds experts"
        elif target.parts:
            problem = "which MLX holds in parts"
        elif "scales" in module:
            problem = "which is quantised"
        elif conv1d and kind == "olora":
            problem = "a Conv1D, which OLoRA reads the wrong way round"
        if problem:
            raise AdapterError(
                f"init_lora_weights={kind!r} on {target.hf_path}, {problem}",
                "Linear layers in floating point, each in one piece",
                "LoraConfig(..., init_lora_weights=True)",
            )


def _pissa(weight: np.ndarray, r: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    left, values, right = np.linalg.svd(weight, full_matrices=False)
    root = np.sqrt(values[:r] / np.float32(scale))
    return root[:, None] * right[:r], left[:, :r] * root


def _olora(weight: np.ndarray, r: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    q, upper = np.linalg.qr(weight)
    return np.ascontiguousarray(upper[:r]), np.ascontiguousarray(q[:, :r])
