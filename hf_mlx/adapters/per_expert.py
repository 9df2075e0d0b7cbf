"""Adapters of older libraries, which hold a pair for each expert: read as PEFT 0.21 reads them.

Source: ``peft.utils.transformers_weight_conversion.build_peft_weight_mapping``: A's one below the other, gate before
up projection; B's of gate and up beside each other on a diagonal, so that each reads its own ranks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import mlx.core as mx

from ..errors import AdapterError
from .adapter import PREFIX
from .blueprint import Blueprint
from .defaults import EXPERT_NAMES

if TYPE_CHECKING:
    from ..models.load import LoadedModel

_KEY = re.compile(rf"{re.escape(PREFIX)}(?P<block>.*\.experts)\.(?P<e>\d+)\.(?P<name>\w+)\.lora_(?P<ab>[AB])\.weight")

# New key → for each part, its keys in the order of the experts.
Stacks = dict[str, list[list[str]]]


def find_apart(loaded: LoadedModel, blueprint: Blueprint, keys: Iterable[str]) -> Stacks:
    """The pairs of single experts among an adapter's keys, by the key of the stack that each belongs to.

    Raises:
        AdapterError: A stack is not whole.
    """
    by_module: dict[str, dict[tuple[str, int], str]] = {}
    for key in keys:
        if loaded.model_type in EXPERT_NAMES and (found := _KEY.fullmatch(key)):
            path = loaded.names.from_hf_module(f"{found['block']}.0.{found['name']}")
            by_module.setdefault(path, {})[found["ab"], int(found["e"])] = key
    stacks: Stacks = {}
    sites = {site.mlx_path: site for site in blueprint.sites}
    for target in blueprint.targets:
        if not any(path in by_module for path in target.paths):
            continue
        for side in "AB":
            wanted = [[(side, e) for e in range(sites[target.mlx_path].experts)] for _ in target.paths]
            held = [by_module.get(path, {}) for path in target.paths]
            lost = [
                f"{path}, expert {e}"
                for path, part, names in zip(target.paths, held, wanted, strict=True)
                for _, e in names
                if (side, e) not in part
            ]
            if lost:
                raise AdapterError(
                    f"an adapter of single experts without lora_{side} of {lost[0]} ({len(lost)} such tensor(s))",
                    "every expert's pair, for gate and up projection alike",
                    "the adapter as it was saved: fetch it again",
                )
            stacks[f"{PREFIX}{target.key}.lora_{side}.weight"] = [
                [part[name] for name in names] for part, names in zip(held, wanted, strict=True)
            ]
    return stacks


def join_experts(stacks: Stacks, tensors: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """``tensors`` with the pairs of single experts stacked under their new keys."""
    taken = {key for parts in stacks.values() for keys in parts for key in keys}
    whole = {key: value for key, value in tensors.items() if key not in taken}
    for key, parts in stacks.items():
        stacked = [mx.stack([tensors[name] for name in names]) for names in parts]
        whole[key] = join_a(stacked) if key.endswith("lora_A.weight") else join_b(stacked)
    return whole


def join_a(parts: list[mx.array]) -> mx.array:
    """A of each part, (experts, r, in) → (experts · ranks, in)."""
    joined = mx.concatenate(parts, axis=1)
    return joined.reshape(-1, joined.shape[-1])


def join_b(parts: list[mx.array]) -> mx.array:
    """B of each part, (experts, rows, r) → (all rows, ranks · experts)."""
    ranks, before = sum(part.shape[-1] for part in parts), 0
    rows = []
    for part in parts:
        rows.append(mx.pad(part, [(0, 0), (0, 0), (before, ranks - before - part.shape[-1])]))
        before += part.shape[-1]
    joined = mx.concatenate(rows, axis=1).transpose(1, 2, 0)
    return joined.reshape(joined.shape[0], -1)
