"""Layers of a model cut over several processes, each of which holds a part of them (tensor parallelism).

Which layers, and along which axis, is what mlx-lm's ``Model.shard`` says, and mlx.nn cuts them. The layers stay what
they were otherwise: smaller ones, around which something is exchanged. One that divides its outputs adds up the
gradients of its input, one that divides its inputs adds up its outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import sum_gradients
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from ..errors import ModelError
from .blockwise import BlockLinear
from .load import LoadedModel, module_at

#: Types that are compared, cut and whole: logits, gradients and adapters.
SPLIT_TYPES = frozenset(
    {"exaone_moe", "glm4_moe", "gpt_oss", "iquestcoder", "llama", "ministral3", "mistral", "olmo", "qwen2", "qwen3"}
    | {"qwen3_moe", "solar_open"}
)
_HEADS = ("num_attention_heads", "num_key_value_heads")
_DIVIDED = (nn.Linear, nn.QuantizedLinear, SwitchLinear, QuantizedSwitchLinear)
_TO_SHARDED = (nn.AllToShardedLinear, nn.QuantizedAllToShardedLinear)


@dataclass(frozen=True)
class Cut:
    """How a Linear layer, or a stack of experts, lies on several processes.

    Attributes:
        axis: Of each weight, (out, in): 0 where each process has some of the outputs, 1 where some of the inputs.
        exchanges: It is for the layer to exchange; else the block around it does.
    """

    axis: int
    exchanges: bool


def check_split(loaded: LoadedModel, ways: int) -> None:
    """Refuse a model that cannot be cut into ``ways`` parts.

    Raises:
        ModelError: Its type is not known to compute the same then, or its heads or weights do not divide.
    """
    name = loaded.model_type
    if name not in SPLIT_TYPES:
        why = (
            "which is not compared cut and whole yet"
            if hasattr(loaded.model, "shard")
            else "for which mlx-lm has no cut"
        )
        raise ModelError(
            f"a model of type {name!r} to be split over {ways} processes, {why}",
            f"one of {', '.join(sorted(SPLIT_TYPES))}",
            "hf-mlx launch without --tensor-parallel, where each process holds the whole model, quantised if need be",
        )
    for key in _HEADS:
        heads = loaded.config.get(key)
        if isinstance(heads, int) and heads % ways:
            raise _indivisible(loaded, ways, f"{key}={heads}")
    if any(isinstance(module, BlockLinear) for module in loaded.model.modules()):
        raise ModelError(
            f"{loaded.path}, packed by bitsandbytes, to be split over {ways} processes",
            "weights in floating point, or quantised by MLX",
            'the original model, with model_init_kwargs={"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}',
        )


def describe_split(loaded: LoadedModel) -> str:
    """Over how many processes a model may be split, and what part of its bytes each of them then holds, in words."""
    model: Any = loaded.model
    inside = sum(_bytes(block) for block in model.layers)
    outside = _bytes(model) - inside
    found = []
    for ways in (2, 3, 4, 6, 8):
        try:
            check_split(loaded, ways)
        except ModelError as error:
            if ways == 2 and loaded.model_type not in SPLIT_TYPES:
                return f"not this type ({error.received.rpartition(', ')[2]})"
            continue
        found.append(f"{ways} processes hold {(inside / ways + outside) / (inside + outside):.0%} each")
    return ", ".join(found) or "its heads do not divide"


def split_layers(loaded: LoadedModel, group: mx.distributed.Group) -> dict[str, Cut]:
    """Leave of every layer that is cut this process's part, in place; nothing is evaluated.

    Args:
        loaded: A model that passed :func:`check_split`, its layers as mlx-lm made them.
        group: The processes.

    Returns:
        How each layer that was cut lies now, by module path. None of them exchanges anything yet: see
        :func:`exchange_around`.

    Raises:
        ModelError: A weight does not divide.
    """
    model: Any = loaded.model
    before = {p: m for p, m in model.named_modules() if isinstance(m, _DIVIDED)}
    shapes = {path: module.weight.shape for path, module in before.items()}
    try:
        model.shard(group)
    except ValueError as error:
        raise _indivisible(loaded, group.size(), f"a weight of another size ({error})") from error
    cuts: dict[str, Cut] = {}
    for path, now in dict(model.named_modules()).items():
        module = before.get(path)
        if module is None:
            continue
        if now is not module:
            cuts[path] = Cut(0 if isinstance(now, _TO_SHARDED) else 1, exchanges=True)
            module.update(now.parameters())
        elif module.weight.shape != shapes[path]:
            cuts[path] = Cut(0 if module.weight.shape[-2] != shapes[path][-2] else 1, exchanges=False)
        if path in cuts and cuts[path] == Cut(1, exchanges=True) and "bias" in module and group.rank():
            # It is added once to the sum of all parts.
            module.bias = mx.zeros_like(module.bias)
    model.update_modules(tree_unflatten([(path, before[path]) for path in cuts]))
    return cuts


def sees_a_part(model: nn.Module, path: str) -> bool:
    """Whether a layer that is not cut lies in a block that adds up only what it gives as a whole: a router of experts.

    Its gradient is then the sum of what each process derives from its part of the block.
    """
    names = path.split(".")
    above = (module_at(model, ".".join(names[:depth])) for depth in range(1, len(names)))
    return any(getattr(module, "sharding_group", None) is not None for module in above)


def exchange_around(model: nn.Module, cuts: dict[str, Cut], group: mx.distributed.Group) -> None:
    """Let the layers at these paths exchange what they have to.

    Layers of one block that read the same array share one sum of its gradients.

    Args:
        model: With its adapters attached: a layer exchanges what it and its adapter make together.
        cuts: Of :func:`split_layers`.
        group: The processes.
    """
    modules, entries = dict(model.named_modules()), {}
    for path, cut in cuts.items():
        if not cut.exchanges:
            continue
        entry = entries.setdefault(path.rpartition(".")[0], _Entry(group))
        module = modules[path]
        module.__class__ = (_entering if cut.axis == 0 else _leaving)(type(module), entry, group)


def _bytes(module: nn.Module) -> int:
    flat: Any = tree_flatten(module.parameters())
    return sum(value.nbytes for _, value in flat)


class _Entry:
    """Where an array that every process has enters the layers of a block, each of which derives a part of it."""

    def __init__(self, group: mx.distributed.Group) -> None:
        self._sum: Any = sum_gradients(group)
        self._seen: tuple[mx.array, mx.array] | None = None

    def __call__(self, x: mx.array) -> mx.array:
        if self._seen is None or self._seen[0] is not x:
            self._seen = (x, self._sum(x))
        return self._seen[1]

    def forget(self) -> None:
        """The block's layers have read what they share."""
        self._seen = None


def _entering(kind: type[Any], entry: _Entry, _: mx.distributed.Group) -> type[Any]:
    def call(self: Any, x: mx.array) -> mx.array:
        return kind.__call__(self, entry(x))

    return type(f"Entered{kind.__name__}", (kind,), {"__call__": call})


def _leaving(kind: type[Any], entry: _Entry, group: mx.distributed.Group) -> type[Any]:
    def call(self: Any, x: mx.array) -> mx.array:
        entry.forget()
        return mx.distributed.all_sum(kind.__call__(self, x), group=group)

    return type(f"Summed{kind.__name__}", (kind,), {"__call__": call})


def _indivisible(loaded: LoadedModel, ways: int, what: str) -> ModelError:
    return ModelError(
        f"{loaded.path} with {what}, to be split over {ways} processes",
        "heads and weights that divide by the number of processes",
        "hf-mlx launch -n 2 --tensor-parallel train.py, or another number that divides them",
    )
