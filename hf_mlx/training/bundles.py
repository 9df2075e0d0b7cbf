"""Small trained arrays end to end in one array, so that an update is a few kernels instead of a few for each of them.

An adapter has hundreds of arrays, and most of what a GPU does to update one is to start. In a bundle they are clipped
and updated at once, and cast at once for the products of the forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import mlx.core as mx

from .optimizers.contract import Arrays

#: Elements above which an array stays alone: starting its kernels is then little, and copying its gradient is not.
LARGEST = 1 << 20
#: Every array begins at a multiple of it, as kernels that read whole vectors want.
ALIGNMENT = 64


@dataclass(frozen=True)
class Bundle:
    """Arrays of one dtype that are treated alike.

    Attributes:
        shapes: By name, in their order in the bundle.
        computed_in: What they are cast to for the forward pass; None leaves them as they are.
    """

    shapes: Mapping[str, tuple[int, ...]]
    computed_in: mx.Dtype | None

    @cached_property
    def _cuts(self) -> tuple[list[int], list[int]]:
        """Where a bundle is cut, and which of the pieces are arrays: the others are gaps."""
        cuts, arrays, at, pieces = [], [], 0, 0
        for shape in self.shapes.values():
            arrays.append(pieces)
            size = math.prod(shape)
            for length in filter(None, (size, -size % ALIGNMENT)):
                at, pieces = at + length, pieces + 1
                cuts.append(at)
        return cuts[:-1], arrays

    def pack(self, arrays: Mapping[str, mx.array]) -> mx.array:
        """All arrays end to end; gaps are zero."""
        pieces = []
        for name in self.shapes:
            flat = arrays[name].reshape(-1)
            pieces.append(flat)
            if gap := -flat.size % ALIGNMENT:
                pieces.append(mx.zeros(gap, flat.dtype))
        return mx.concatenate(pieces)

    def unpack(self, flat: mx.array) -> Arrays:
        """Views of the arrays in ``flat``."""
        cuts, arrays = self._cuts
        pieces = mx.split(flat, cuts)
        return {
            name: pieces[index].reshape(shape) for (name, shape), index in zip(self.shapes.items(), arrays, strict=True)
        }


class Bundles:
    """How the trained arrays are kept: in bundles, and those that are large alone.

    A bundle goes by the name of its first array, so that what is said of that name holds for all of it.

    Args:
        params: {name: array}.
        decay: Names that weight decay applies to; no bundle mixes them with others.
        computed_in: Names that the model only reads cast to a dtype, and that dtype.
        largest: Elements of the largest array that is bundled; 0 bundles none.
        kinds: What else tells names apart that no bundle mixes.
    """

    def __init__(
        self,
        params: Mapping[str, mx.array],
        decay: Iterable[str],
        computed_in: Mapping[str, mx.Dtype],
        largest: int = LARGEST,
        kinds: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._names = list(params)
        decay = frozenset(decay)
        alike: dict[tuple, dict[str, tuple[int, ...]]] = {}
        for name, array in params.items():
            if 0 < array.size <= largest:
                key = (array.dtype, name in decay, computed_in.get(name), kinds.get(name))
                alike.setdefault(key, {})[name] = array.shape
        self._bundles = {next(iter(shapes)): Bundle(shapes, key[2]) for key, shapes in alike.items()}
        bundled = {name for bundle in self._bundles.values() for name in bundle.shapes}
        # MLX begins with what it is asked for last, and the largest are updated once the other gradients are gone.
        self._alone = sorted(
            (name for name in params if name not in bundled), key=lambda name: params[name].size, reverse=True
        )

    def __eq__(self, other: object) -> bool:
        """Whether every array lies where it does in ``other``."""
        return isinstance(other, Bundles) and (self._names, self._bundles) == (other._names, other._bundles)

    def pack(self, arrays: Mapping[str, mx.array]) -> Arrays:
        """Arrays as they are kept: of each bundle one, flat.

        Args:
            arrays: All that is trained by name, or something else of the same shapes: gradients, moments.
        """
        alone = {name: arrays[name] for name in self._alone if name in arrays}
        return {name: bundle.pack(arrays) for name, bundle in self._bundles.items() if name in arrays} | alone

    def unpack(self, packed: Mapping[str, mx.array], *, cast: bool = False) -> Arrays:
        """What :meth:`pack` was given: views, in the order of the parameters.

        Args:
            packed: Of :meth:`pack`.
            cast: Each bundle in the dtype that it is computed in.
        """
        found = {name: packed[name] for name in self._alone if name in packed}
        for name, bundle in self._bundles.items():
            if name in packed:
                flat = packed[name]
                found |= bundle.unpack(flat.astype(bundle.computed_in) if cast and bundle.computed_in else flat)
        return {name: found[name] for name in self._names if name in found}
