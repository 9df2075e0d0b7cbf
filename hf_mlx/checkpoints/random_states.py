"""The random states of a run: MLX's key, the order's generator, and those of Python, numpy and torch."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..data.generator import TorchGenerator


@dataclass
class RandomStates:
    """What every draw of the run comes from, at one moment.

    Attributes:
        key: MLX's key, uint32 of shape [2]; None when another library wrote the checkpoint.
        order: The generator that stands for torch's global one.
        python, numpy: ``random.getstate()`` and ``numpy.random.get_state()``, which user code may draw from.
        torch: torch's own CPU state, uint8 of shape [5056], if torch was imported.
    """

    key: mx.array | None
    order: dict[str, Any] | None
    python: Any
    numpy: Any
    torch: np.ndarray | None = None

    @classmethod
    def capture(cls, order: TorchGenerator) -> RandomStates:
        """The states of now. Waits for nothing: the key may still be a pending computation."""
        torch = sys.modules.get("torch")
        return cls(
            key=next(iter(mx.random.state)),  # pyright: ignore[reportArgumentType, reportCallIssue]
            order=order.get_state(),
            python=random.getstate(),
            numpy=np.random.get_state(),
            torch=None if torch is None else torch.get_rng_state().numpy().copy(),
        )

    def restore(self, order: TorchGenerator) -> None:
        """Go on from these states."""
        if self.key is not None:
            high, low = (int(word) for word in self.key.tolist())  # pyright: ignore[reportGeneralTypeIssues, reportArgumentType]
            # MLX splits a 64-bit seed into the two words of its key, which makes this its setter.
            mx.random.seed((high << 32) | low)
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch = sys.modules.get("torch")
        if self.torch is not None and torch is not None:
            torch.set_rng_state(torch.from_numpy(np.array(self.torch, dtype=np.uint8)))
        if self.order is not None:
            # Last, since torch's generator goes with it.
            order.set_state(self.order)

    def to_hf(self) -> dict[str, Any]:
        """The content of ``rng_state.pth``: the order's generator takes the place of torch's."""
        generator = TorchGenerator()
        if self.order is not None:
            generator.set_state(self.order)
        return {"python": self.python, "numpy": self.numpy, "cpu": mx.array(generator.to_torch_state())}

    def to_tree(self) -> dict[str, Any]:
        """The part that ``rng_state.pth`` has no place for."""
        return {
            "key": None if self.key is None else self.key.tolist(),
            "order": self.order,
            "torch": None if self.torch is None else self.torch.tobytes().hex(),
        }

    def pack(self) -> dict[str, Any]:
        """All of it as JSON has it, for another process."""
        numpy = [part.tolist() if isinstance(part, np.ndarray) else part for part in self.numpy]
        return {"python": self.python, "numpy": numpy, **self.to_tree()}

    @classmethod
    def unpack(cls, packed: Mapping[str, Any]) -> RandomStates:
        """What :meth:`pack` returned."""
        name, words, *rest = packed["numpy"]
        return cls.from_files({"python": packed["python"], "numpy": (name, np.array(words, np.uint32), *rest)}, packed)

    @classmethod
    def from_files(cls, hf: Mapping[str, Any], tree: Mapping[str, Any] | None) -> RandomStates:
        """From the content of ``rng_state.pth`` and, where this library wrote it, of :meth:`to_tree`."""
        numpy = tuple(np.array(part) if isinstance(part, mx.array) else part for part in hf["numpy"])
        python = _tuples(hf["python"])
        if tree is None:
            generator = TorchGenerator()
            generator.set_torch_state(np.array(hf["cpu"]))
            states = cls(None, generator.get_state(), python, numpy)
        else:
            torch = None if tree["torch"] is None else np.frombuffer(bytes.fromhex(tree["torch"]), dtype=np.uint8)
            key = None if tree["key"] is None else mx.array(tree["key"], dtype=mx.uint32)
            states = cls(key, tree["order"], python, numpy, torch)
        states._rehearse()
        return states

    def _rehearse(self) -> None:
        """Set generators of no consequence to these states, so that the real ones are not left half set."""
        random.Random().setstate(self.python)
        np.random.RandomState().set_state(self.numpy)
        if self.key is not None and self.key.shape != (2,):
            raise ValueError(f"a key of shape {self.key.shape}")
        if self.order is not None:
            order = TorchGenerator()
            order.set_state(self.order)
            order.to_torch_state()


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value
