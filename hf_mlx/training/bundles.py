"""Small trained arrays end to end in one array, so that an update is a few kernels instead of a few for each of them.

An adapter has hundreds of arrays, and most of what a GPU does to update one is to start. In a bundle they are clipped
and updated at once, and cast at once for the products of the forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from types import MappingProxyType
from typing import Any

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
        blocks: Shapes by name, in their order in the bundle. Those of a block differ in their first axis alone and lie
            along it: what is done to make an array of a piece of the bundle is done for all of them at once.
        computed_in: What they are cast to for the forward pass; None leaves them as they are.
    """

    blocks: tuple[Mapping[str, tuple[int, ...]], ...]
    computed_in: mx.Dtype | None

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]], computed_in: mx.Dtype | None) -> Bundle:
        """The arrays of these shapes; those that would not end where another may begin are blocks of their own."""
        blocks: dict[Any, dict[str, tuple[int, ...]]] = {}
        for name, shape in shapes.items():
            together = shape and math.prod(shape) % ALIGNMENT == 0
            blocks.setdefault(shape[1:] if together else name, {})[name] = shape
        return cls(tuple(blocks.values()), computed_in)

    @property
    def names(self) -> list[str]:
        """Of the arrays, in their order."""
        return [name for block in self.blocks for name in block]

    @cached_property
    def _cuts(self) -> tuple[list[int], list[int]]:
        """Where a bundle is cut, and which of the pieces are blocks: the others are gaps."""
        cuts, blocks, at, pieces = [], [], 0, 0
        for block in self.blocks:
            blocks.append(pieces)
            size = sum(map(math.prod, block.values()))
            for length in filter(None, (size, -size % ALIGNMENT)):
                at, pieces = at + length, pieces + 1
                cuts.append(at)
        return cuts[:-1], blocks

    def pack(self, arrays: Mapping[str, mx.array]) -> mx.array:
        """All arrays end to end; gaps are zero."""
        pieces = []
        for block in self.blocks:
            flat = _join([arrays[name] for name in block]).reshape(-1)
            pieces.append(flat)
            if gap := -flat.size % ALIGNMENT:
                pieces.append(mx.zeros(gap, flat.dtype))
        return _join(pieces)

    def unpack(self, flat: mx.array) -> Arrays:
        """Views of the arrays in ``flat``."""
        cuts, places = self._cuts
        pieces, found = mx.split(flat, cuts), {}
        for block, place in zip(self.blocks, places, strict=True):
            (first, *_), piece = block.values(), pieces[place]
            if len(block) == 1:
                found |= dict.fromkeys(block, piece.reshape(first))
                continue
            ends = list(accumulate(shape[0] for shape in block.values()))
            found |= zip(block, mx.split(piece.reshape(-1, *first[1:]), ends[:-1]), strict=True)
        return found


def _join(arrays: list[mx.array]) -> mx.array:
    return arrays[0] if len(arrays) == 1 else mx.concatenate(arrays)


class Bundles:
    """How the trained arrays are kept: in bundles, and those that are large alone.

    A bundle goes by the name of its first array, so that what is said of that name holds for all of it.

    Args:
        params: {name: array}.
        decay: Names that weight decay applies to; no bundle mixes them with others.
        computed_in: Names that the model only reads cast to a dtype, and that dtype.
        largest: Elements of the largest array that is bundled; 0 bundles none.
        kinds: What else tells names apart that no bundle mixes.

    Attributes:
        alone: Names of what is in no bundle.
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
        self._bundles = {next(iter(shapes)): Bundle.of(shapes, key[2]) for key, shapes in alike.items()}
        bundled = {name for bundle in self._bundles.values() for name in bundle.names}
        # MLX begins with what it is asked for last, and the largest are updated once the other gradients are gone.
        self.alone = sorted(
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
        alone = {name: arrays[name] for name in self.alone if name in arrays}
        return {name: bundle.pack(arrays) for name, bundle in self._bundles.items() if name in arrays} | alone

    def unpack(self, packed: Mapping[str, mx.array], *, cast: bool = False) -> Arrays:
        """What :meth:`pack` was given: views, in the order of the parameters.

        Args:
            packed: Of :meth:`pack`.
            cast: Each bundle in the dtype that it is computed in.
        """
        found = {name: packed[name] for name in self.alone if name in packed}
        for name, bundle in self._bundles.items():
            if name in packed:
                flat = packed[name]
                found |= bundle.unpack(flat.astype(bundle.computed_in) if cast and bundle.computed_in else flat)
        return {name: found[name] for name in self._names if name in found}
