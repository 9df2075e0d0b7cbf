"""Reversible steps between a Hugging Face checkpoint and MLX parameters: names, stacking, transposes.

mlx-lm's ``sanitize`` goes one way only. Each step here goes both ways, so what was loaded can be
written back under HF's names and layouts. Templates name a tensor: ``{x}`` stands for one path
segment, ``{x*}`` for any number of them, and the same field stands on both sides.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Protocol

import mlx.core as mx

Weights = dict[str, mx.array]


@lru_cache(maxsize=4096)
def _pattern(template: str) -> re.Pattern[str]:
    parts = re.split(r"(\{\w+\*?\})", template)
    out = []
    for part in parts:
        if part.startswith("{"):
            name = part[1:-1]
            out.append(f"(?P<{name[:-1]}>.*)" if name.endswith("*") else f"(?P<{name}>[^.]+)")
        else:
            out.append(re.escape(part))
    return re.compile("".join(out))


def _fill(template: str, fields: Mapping[str, str]) -> str:
    return re.sub(r"\{(\w+)\*?\}", lambda m: fields[m.group(1)], template)


def _match(template: str, name: str) -> dict[str, str] | None:
    found = _pattern(template).fullmatch(name)
    return found.groupdict() if found else None


class Step(Protocol):
    """One reversible step. ``load`` and ``save`` map whole weight dicts, ``hf_names`` a single name."""

    def load(self, weights: Weights) -> Weights:
        """HF to MLX."""
        ...

    def save(self, weights: Weights) -> Weights:
        """MLX to HF."""
        ...

    def hf_names(self, name: str) -> list[str]:
        """HF names that the MLX parameter ``name`` is made of, before this step's load."""
        ...

    def mlx_name(self, name: str) -> str:
        """MLX parameter that the HF tensor ``name`` goes into."""
        ...


@dataclass(frozen=True)
class Rename:
    """A tensor that only changes its name."""

    hf: str
    mlx: str

    def load(self, weights: Weights) -> Weights:
        return {self.mlx_name(k): v for k, v in weights.items()}

    def save(self, weights: Weights) -> Weights:
        return {self.hf_names(k)[0]: v for k, v in weights.items()}

    def hf_names(self, name: str) -> list[str]:
        fields = _match(self.mlx, name)
        return [name if fields is None else _fill(self.hf, fields)]

    def mlx_name(self, name: str) -> str:
        fields = _match(self.hf, name)
        return name if fields is None else _fill(self.mlx, fields)


@dataclass(frozen=True)
class Drop:
    """An HF tensor that no computation reads here (a buffer, another modality)."""

    hf: str

    def load(self, weights: Weights) -> Weights:
        return {k: v for k, v in weights.items() if _match(self.hf, k) is None}

    def save(self, weights: Weights) -> Weights:
        return weights

    def hf_names(self, name: str) -> list[str]:
        return [name]

    def mlx_name(self, name: str) -> str:
        return name


class _Relayout:
    """A step that keeps every name and changes the array of those that match ``name``."""

    name: str

    def to_mlx(self, x: mx.array) -> mx.array:
        raise NotImplementedError

    def to_hf(self, x: mx.array) -> mx.array:
        raise NotImplementedError

    def load(self, weights: Weights) -> Weights:
        return {k: self.to_mlx(v) if _match(self.name, k) else v for k, v in weights.items()}

    def save(self, weights: Weights) -> Weights:
        return {k: self.to_hf(v) if _match(self.name, k) else v for k, v in weights.items()}

    def hf_names(self, name: str) -> list[str]:
        return [name]

    def mlx_name(self, name: str) -> str:
        return name


@dataclass(frozen=True)
class Transpose(_Relayout):
    """Axes permuted: MLX's axis i is HF's axis ``axes[i]`` (torch Conv1d (O,1,K) → MLX (O,K,1))."""

    name: str
    axes: tuple[int, ...] = (0, 2, 1)

    def to_mlx(self, x: mx.array) -> mx.array:
        return mx.contiguous(x.transpose(self.axes))

    def to_hf(self, x: mx.array) -> mx.array:
        return mx.contiguous(x.transpose(sorted(range(len(self.axes)), key=self.axes.__getitem__)))


@dataclass(frozen=True)
class Scalar(_Relayout):
    """A one-element vector (1,) in HF, a scalar () in MLX."""

    name: str

    def to_mlx(self, x: mx.array) -> mx.array:
        return x.reshape(())

    def to_hf(self, x: mx.array) -> mx.array:
        return x.reshape((1,))


@dataclass(frozen=True)
class Stack:
    """Experts: HF keeps one tensor for each, MLX one stacked tensor (E, …). ``{e}`` is the expert."""

    hf: str
    mlx: str

    @cached_property
    def _fields(self) -> tuple[str, ...]:
        return tuple(f for f in _pattern(self.mlx).groupindex)

    def load(self, weights: Weights) -> Weights:
        out, groups = {}, {}
        for name, value in weights.items():
            fields = _match(self.hf, name)
            if fields is None:
                out[name] = value
            else:
                groups.setdefault(_fill(self.mlx, fields), {})[int(fields["e"])] = value
        for name, experts in groups.items():
            out[name] = mx.stack([experts[e] for e in range(len(experts))])
        return out

    def save(self, weights: Weights) -> Weights:
        out = {}
        for name, value in weights.items():
            fields = _match(self.mlx, name)
            if fields is None:
                out[name] = value
            else:
                for e in range(value.shape[0]):
                    out[_fill(self.hf, {**fields, "e": str(e)})] = mx.contiguous(value[e])
        return out

    def hf_names(self, name: str) -> list[str]:
        fields = _match(self.mlx, name)
        # {e} stays in the name; NameMap fills it with the number of experts.
        return [name] if fields is None else [_fill(self.hf, {**fields, "e": "{e}"})]

    def mlx_name(self, name: str) -> str:
        fields = _match(self.hf, name)
        return name if fields is None else _fill(self.mlx, fields)


@dataclass(frozen=True)
class Concat:
    """One HF tensor that MLX keeps in parts along ``axis`` (gate_up_proj → gate_proj, up_proj).

    ``strided`` parts take turns instead of following each other.
    """

    hf: str
    mlx: tuple[str, ...]
    axis: int = 0
    strided: bool = False

    def load(self, weights: Weights) -> Weights:
        out = {}
        for name, value in weights.items():
            fields = _match(self.hf, name)
            if fields is None:
                out[name] = value
            else:
                parts = self._split(value)
                out.update({_fill(t, fields): mx.contiguous(p) for t, p in zip(self.mlx, parts, strict=True)})
        return out

    def save(self, weights: Weights) -> Weights:
        out = dict(weights)
        for name in weights:
            fields = _match(self.mlx[0], name)
            if fields is not None:
                parts = [out.pop(_fill(t, fields)) for t in self.mlx]
                out[_fill(self.hf, fields)] = self._join(parts)
        return out

    def _split(self, value: mx.array) -> list[mx.array]:
        parts: Any = mx.split(value, len(self.mlx), axis=self.axis)
        if self.strided:
            parts = mx.unstack(mx.unflatten(value, self.axis, (-1, len(self.mlx))), axis=self.axis + 1)
        return list(parts)

    def _join(self, parts: list[mx.array]) -> mx.array:
        if not self.strided:
            return mx.concatenate(parts, axis=self.axis)
        return mx.flatten(mx.stack(parts, axis=self.axis + 1), self.axis, self.axis + 1)

    def hf_names(self, name: str) -> list[str]:
        for template in self.mlx:
            fields = _match(template, name)
            if fields is not None:
                return [_fill(self.hf, fields)]
        return [name]

    def mlx_name(self, name: str) -> str:
        fields = _match(self.hf, name)
        return name if fields is None else _fill(self.mlx[0], fields)


@dataclass(frozen=True)
class HeadSplit:
    """Multi-head latent attention's ``kv_b_proj`` (heads·(nope+v), rank) → per-head keys and values.

    mlx-lm absorbs it: ``embed_q`` (heads, rank, nope) and ``unembed_out`` (heads, v, rank).
    """

    hf: str
    keys: str
    values: str
    heads: int
    nope: int

    def load(self, weights: Weights) -> Weights:
        out = {}
        for name, value in weights.items():
            fields = _match(self.hf, name)
            if fields is None:
                out[name] = value
                continue
            per_head = value.reshape(self.heads, -1, value.shape[-1])
            out[_fill(self.keys, fields)] = mx.contiguous(per_head[:, : self.nope].swapaxes(-1, -2))
            out[_fill(self.values, fields)] = mx.contiguous(per_head[:, self.nope :])
        return out

    def save(self, weights: Weights) -> Weights:
        out = dict(weights)
        for name in weights:
            fields = _match(self.keys, name)
            if fields is not None:
                keys, values = out.pop(name).swapaxes(-1, -2), out.pop(_fill(self.values, fields))
                merged = mx.concatenate([keys, values], axis=1)
                out[_fill(self.hf, fields)] = merged.reshape(-1, merged.shape[-1])
        return out

    def hf_names(self, name: str) -> list[str]:
        for template in (self.keys, self.values):
            fields = _match(template, name)
            if fields is not None:
                return [_fill(self.hf, fields)]
        return [name]

    def mlx_name(self, name: str) -> str:
        fields = _match(self.hf, name)
        return name if fields is None else _fill(self.keys, fields)
