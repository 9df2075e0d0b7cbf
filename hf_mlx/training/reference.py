"""The reference of preference training: the policy as it was, found without a second copy of it where that is possible.

A reference runs inside the policy's compiled step, under ``stop_gradient``; frozen arrays are constants of the trace.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..adapters.adapter import Adapter
from ..models.heads import layers, module_at
from ..models.load import LoadedModel
from .blocked_attention import attend_in_blocks
from .objective import Slots
from .optimizers.contract import Arrays
from .pairs import Scorer


class AdapterOff:
    """The policy without its adapter, as ``peft.PeftModel.disable_adapter`` (0.21) leaves it.

    Adapted layers are replaced by their base layer while the trace is made, so no arithmetic on zeros is done. Modules
    that train in full go back to where they started; a bias that trains is part of the base layer and stays trained.

    Args:
        adapter: Attached; its arrays are at their start.
        score: The policy's.
        slots: What trains.
    """

    def __init__(self, adapter: Adapter, score: Scorer, slots: Slots) -> None:
        self._model, self._score, self._slots = score.model, score, slots
        blueprint = adapter.blueprint
        self._adapted = [path for target in blueprint.targets for path in target.paths]
        self._adapted += [rows.site.mlx_path for rows in blueprint.rows]
        saved = tuple(f"{site.mlx_path}." for site in blueprint.saved)
        start = {name: value for name, value in slots.read().items() if name.startswith(saved or ("\0",))}
        self._start = {name: mx.stop_gradient(value) for name, value in start.items()}
        mx.eval(self._start)
        self.held_bytes = sum(value.nbytes for value in self._start.values())

    def __call__(self, params: Arrays, arrays: Arrays) -> mx.array:
        params = {**params, **self._start}
        self._slots.bind(params)
        with self._without_adapter():
            return self._score.logp(params, arrays)

    @contextmanager
    def _without_adapter(self) -> Iterator[None]:
        adapted = {path: module_at(self._model, path) for path in self._adapted}
        _replace(self._model, {path: module["base_layer"] for path, module in adapted.items()})
        try:
            yield
        finally:
            _replace(self._model, adapted)


class StartCopy:
    """The policy with the arrays that it started from.

    Args:
        score: The policy's.
        slots: What trains.
        start: Flat {MLX name: array}; None takes what is in the model now.

    Attributes:
        arrays: The frozen arrays.
    """

    def __init__(self, score: Scorer, slots: Slots, start: Mapping[str, mx.array] | None = None) -> None:
        self._score, self._slots = score, slots
        # Arrays of their own over the same memory: what a compiled function is called with is no constant of its trace.
        self.arrays = {name: mx.stop_gradient(value) for name, value in (start or slots.read()).items()}
        # Constants of a trace must be data, not views that are still to be computed.
        mx.eval(self.arrays)
        self.held_bytes = sum(value.nbytes for value in self.arrays.values())

    def __call__(self, params: Arrays, arrays: Arrays) -> mx.array:
        self._slots.bind(self.arrays)
        return self._score.logp(self.arrays, arrays)


class OtherModel:
    """A second model.

    Args:
        loaded: Frozen here.
        names: Its arrays that may move.

    Attributes:
        arrays: Those.
        score: Its log-probabilities.
    """

    def __init__(self, loaded: LoadedModel, names: Iterable[str] = ()) -> None:
        attend_in_blocks(layers(loaded.model))
        loaded.model.freeze()
        loaded.model.eval()
        mx.eval(loaded.model.parameters())
        self.model = loaded.model
        self._slots = Slots(loaded.model, names)
        self.arrays = self._slots.read()
        self.score = Scorer(loaded, self._slots)
        weights: dict[str, mx.array] = dict(tree_flatten(loaded.model.parameters()))
        self.held_bytes = sum(value.nbytes for value in weights.values())

    def __call__(self, params: Arrays, arrays: Arrays) -> mx.array:
        self._slots.bind(self.arrays)
        return self.score.logp(self.arrays, arrays)


def move_towards(arrays: Arrays, params: Arrays, share: float) -> None:
    """Replace a reference's arrays by ``(1 - share) * arrays + share * params``, each rounded as torch does it.

    trl 1.16 ``SyncRefModelCallback``: ``target.mul_(1 - share).add_(source, alpha=share)``.
    """
    for name, value in arrays.items():
        kept = (value * (1.0 - share)).astype(value.dtype).astype(mx.float32)
        arrays[name] = (kept + share * params[name].astype(mx.float32)).astype(value.dtype)
    mx.eval(arrays)


def same_weights(first: LoadedModel, second: LoadedModel) -> bool:
    """Whether two models of one architecture hold the same numbers."""
    ours = dict(tree_flatten(first.model.parameters()))
    theirs = dict(tree_flatten(second.model.parameters()))
    if ours.keys() != theirs.keys():
        return False
    return all(bool(mx.array_equal(value, theirs[name].astype(value.dtype)).item()) for name, value in ours.items())


def _replace(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    model.update_modules(tree_unflatten(list(modules.items())))
