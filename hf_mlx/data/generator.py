"""torch's CPU random generator without torch: the same bits from numpy's MT19937."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

_WORDS = 624
_LARGE = (2**32 - 1) // 20
# How many draws are converted at a time: the float64 intermediates then stay in cache.
_BLOCK = 1 << 16


class TorchGenerator:
    """``torch.Generator().manual_seed(seed)`` on the CPU, reproduced draw for draw.

    Integers, permutations and float32 uniforms are equal to torch's bit for bit; normals are within
    1e-6 of a standard deviation (3 ulp seen over a million), because torch has its own vector log, sin and cos.

    Args:
        seed: Any 64-bit integer, negative ones included. As in torch only the low 32 bits reach the engine.

    Example:
        >>> TorchGenerator(42).randperm(5)
        array([0, 4, 2, 1, 3])

    Reference: torch 2.13, ``at::CPUGeneratorImpl``, ``at::mt19937`` and ``ATen/core/DistributionsHelper.h``.
    """

    def __init__(self, seed: int = 0) -> None:
        self._engine = np.random.MT19937(0)
        self._draw = np.random.Generator(self._engine)
        # Key and position of the engine, until the next draw: a state is asked for at every step.
        self._known: tuple[list[int], int] | None = None
        self.manual_seed(seed)

    def manual_seed(self, seed: int) -> TorchGenerator:
        """Restart from ``seed``, as ``torch.Generator.manual_seed``; returns self."""
        self.initial_seed = seed % 2**64
        # numpy's integer seeding of the legacy generator is Knuth's recurrence, the one torch uses.
        legacy = np.random.RandomState(self.initial_seed & 0xFFFFFFFF).get_state(legacy=False)
        self._engine.state = {"bit_generator": "MT19937", "state": legacy["state"]}
        self._next_normal: float | None = None
        self._known = None
        return self

    def random(self, n: int) -> np.ndarray:
        """The next ``n`` raw 32-bit draws of the engine: uint32, shape [n]."""
        self._known = None
        return self._draw.integers(0, 2**32, n, dtype=np.uint32)

    def random64(self, n: int) -> np.ndarray:
        """The next ``n`` 64-bit draws, two engine draws each, high word first: uint64, shape [n]."""
        words = self.random(2 * n).astype(np.uint64)
        return (words[0::2] << np.uint64(32)) | words[1::2]

    def seed_int64(self) -> int:
        """``torch.empty((), dtype=torch.int64).random_().item()``, the draw that seeds samplers and loader workers."""
        return int(self.random64(1)[0]) & (2**63 - 1)

    def randperm(self, n: int) -> np.ndarray:
        """``torch.randperm(n, generator=...)``: int64, shape [n].

        Reference: ``randperm_cpu`` in ATen/native/TensorFactories.cpp.
        """
        if n < _LARGE:
            return self._shuffle(n)
        return self._shuffle_inside_out(n)

    def _shuffle(self, n: int) -> np.ndarray:
        # Every swap depends on the one before, so this is a plain loop; lists make it 5x faster than an array.
        count = max(n - 1, 0)
        index = np.arange(count, dtype=np.int64)
        partners = (index + self.random(count) % (n - index)).tolist()
        order = list(range(n))
        for i, z in enumerate(partners):
            order[i], order[z] = order[z], order[i]
        return np.array(order, dtype=np.int64)

    def _shuffle_inside_out(self, n: int) -> np.ndarray:
        order = np.empty(n, dtype=np.int64)
        for start in range(0, n, _BLOCK):
            draws = self.random64(min(_BLOCK, n - start))
            spans = np.arange(start + 1, start + 1 + len(draws), dtype=np.uint64)
            for i, z in enumerate((draws % spans).tolist(), start):
                order[i] = i
                order[i], order[z] = order[z], order[i]
        return order

    def uniform(self, shape: int | tuple[int, ...], low: float = 0.0, high: float = 1.0) -> np.ndarray:
        """``torch.empty(shape).uniform_(low, high)``: float32 in [low, high), 24 random bits each."""
        size = int(np.prod(shape))
        start = np.float64(np.float32(low))
        span = np.float64(np.float32(high) - np.float32(low))
        out = np.empty(size, dtype=np.float32)
        for begin in range(0, size, _BLOCK):
            part = out[begin : begin + _BLOCK]
            bits = self.random(len(part)) & np.uint32(0xFFFFFF)
            # torch's compilers contract x*span+low to one rounding; float64 holds the product exactly.
            part[:] = (bits * 2.0**-24) * span + start
        return out.reshape(shape)

    def kaiming_uniform(self, shape: tuple[int, ...], a: float = 0.0) -> np.ndarray:
        """``torch.nn.init.kaiming_uniform_(w, a)`` (fan_in, leaky_relu): float32 of ``shape`` [out, in, ...]."""
        fan_in = math.prod(shape[1:])
        bound = math.sqrt(3.0) * (math.sqrt(2.0 / (1 + a**2)) / math.sqrt(fan_in))
        return self.uniform(shape, -bound, bound)

    def normal(self, shape: int | tuple[int, ...], std: float = 1.0, mean: float = 0.0) -> np.ndarray:
        """``torch.empty(shape).normal_(mean, std)``: float32, within 1e-6·std; the same generator state after.

        Reference: ``normal_fill`` in ATen/native/cpu/DistributionTemplates.h (16 values or more), else
        ``at::normal_distribution<double>``, which keeps the second value of each pair for the next call.
        """
        size = int(np.prod(shape))
        values = self._normal_fill(size) if size >= 16 else self._normal_pairs(size)
        return (values * std + mean).astype(np.float32).reshape(shape)

    def _normal_fill(self, size: int) -> np.ndarray:
        uniforms = self.uniform(size)
        blocks = _box_muller(uniforms[: size - size % 16])
        if size % 16 == 0:
            return blocks
        # The last 16 values are drawn afresh, over the tail of the last whole block.
        return np.concatenate([blocks[: size - 16], _box_muller(self.uniform(16))])

    def _normal_pairs(self, size: int) -> np.ndarray:
        out = np.empty(size)
        for i in range(size):
            if self._next_normal is not None:
                out[i], self._next_normal = self._next_normal, None
                continue
            angle, radius = (int(draw) % 2**53 * 2.0**-53 for draw in self.random64(2))
            length = math.sqrt(-2.0 * math.log1p(-radius))
            out[i] = length * math.cos(2 * math.pi * angle)
            self._next_normal = length * math.sin(2 * math.pi * angle)
        return out

    def get_state(self) -> dict[str, Any]:
        """Everything needed to go on from here: ``initial_seed``, ``key`` (624 ints), ``pos``, ``next_normal``."""
        if self._known is None:
            state = self._engine.state["state"]
            self._known = state["key"].tolist(), int(state["pos"])
        key, pos = self._known
        return {"initial_seed": self.initial_seed, "key": list(key), "pos": pos, "next_normal": self._next_normal}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from a state that :meth:`get_state` returned."""
        key = np.array(state["key"], dtype=np.uint32)
        self._engine.state = {"bit_generator": "MT19937", "state": {"key": key, "pos": state["pos"]}}
        self._known = None
        self.initial_seed = state["initial_seed"]
        self._next_normal = state["next_normal"]

    def to_torch_state(self) -> np.ndarray:
        """The uint8 [5056] array of ``torch.get_rng_state()``, for ``rng_state.pth``."""
        state = self._engine.state["state"]
        record = np.zeros(1, dtype=_TORCH_STATE)
        pos = int(state["pos"])
        record["seed"], record["seeded"] = self.initial_seed, 1
        # numpy says "block used up" with pos 624; torch with left 1, whichever its next index.
        record["left"], record["next"] = (1, 0) if pos == _WORDS else (_WORDS + 1 - pos, pos)
        record["key"] = state["key"]
        if self._next_normal is not None:
            record["normal"], record["normal_valid"] = self._next_normal, 1
        return record.view(np.uint8).reshape(-1)

    def set_torch_state(self, state: np.ndarray) -> None:
        """Go on from the bytes of ``torch.get_rng_state().numpy()``: uint8, shape [5056]."""
        self.set_state(read_torch_state(state))


def read_torch_state(state: np.ndarray) -> dict[str, Any]:
    """The bytes of ``torch.get_rng_state().numpy()`` as what :meth:`TorchGenerator.set_state` takes."""
    record = np.ascontiguousarray(state, dtype=np.uint8).view(_TORCH_STATE)[0]
    return {
        "initial_seed": int(record["seed"]),
        "key": record["key"].astype(np.uint32),
        "pos": _WORDS if record["left"] == 1 else int(record["next"]),
        "next_normal": float(record["normal"]) if record["normal_valid"] else None,
    }


# at::CPUGeneratorImplState: the legacy struct (words kept in 64 bits), then the float sample that nothing uses.
_TORCH_STATE = np.dtype(
    [
        ("seed", "<u8"),
        ("left", "<i4"),
        ("seeded", "<i4"),
        ("next", "<u8"),
        ("key", "<u8", (_WORDS,)),
        ("normal_x", "<f8"),
        ("normal", "<f8"),
        ("normal_rho", "<f8"),
        ("normal_valid", "<i8"),
        ("float_sample", "<i8"),
    ]
)


def _box_muller(uniforms: np.ndarray) -> np.ndarray:
    """Pairs (j, j+8) of each 16 uniforms to two normals, in float32 as torch does."""
    pairs = uniforms.reshape(-1, 2, 8)
    radius = np.sqrt(np.float32(-2.0) * np.log(np.float32(1.0) - pairs[:, 0]))
    theta = np.float32(2.0 * math.pi) * pairs[:, 1]
    return np.stack([radius * np.cos(theta), radius * np.sin(theta)], axis=1).reshape(-1)
