"""torch's global CPU generator, with or without torch."""

from __future__ import annotations

import random
import sys
from typing import Any

import numpy as np

from .generator import TorchGenerator, read_torch_state

# at::detail::default_rng_seed_val: the seed of a process in which nobody has seeded torch.
_UNSEEDED = 67280421310721


class ProcessGenerator(TorchGenerator):
    """The generator that torch's samplers, and the script's own code, draw from.

    Where torch is imported the two are one: a draw moves torch's, and what the script draws or seeds there counts here.
    Until then this is what torch's would be.

    Args:
        seed: Of this one; torch's is left as it is.
    """

    def __init__(self, seed: int = 0) -> None:
        # torch's state when the two were last alike; None before torch was seen.
        self._alike: bytes | None = None
        super().__init__(seed)

    def seed_both(self, seed: int) -> None:
        """Restart this and torch's from ``seed``."""
        self.manual_seed(seed)
        self._push()

    def random(self, n: int) -> np.ndarray:
        """The next ``n`` raw 32-bit draws of both: uint32, shape [n]."""
        self.join()
        drawn = super().random(n)
        self._push()
        return drawn

    def get_state(self) -> dict[str, Any]:
        """As of :class:`TorchGenerator`, with what was drawn from torch's."""
        self.join()
        return super().get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Let both go on from a state that :meth:`get_state` returned."""
        super().set_state(state)
        self._push()

    def to_torch_state(self) -> np.ndarray:
        """As of :class:`TorchGenerator`, with what was drawn from torch's."""
        self.join()
        return super().to_torch_state()

    def join(self) -> None:
        """Go on from torch's generator, or let one that nobody has seeded go on from here."""
        torch = _torch()
        if torch is None:
            return
        if self._alike is None and torch.initial_seed() == _UNSEEDED:
            self._push()
            return
        state = torch.get_rng_state().numpy()
        if (now := state.tobytes()) != self._alike:
            super().set_state(read_torch_state(state))
            self._alike = now

    def _push(self) -> None:
        if (torch := _torch()) is not None:
            torch.set_rng_state(torch.from_numpy(super().to_torch_state().copy()))
            self._alike = torch.get_rng_state().numpy().tobytes()


def seed_process(seed: int, generator: ProcessGenerator) -> None:
    """What upstream's constructor leaves: Python's, numpy's and torch's generators seeded.

    Reference: transformers 5.23 ``set_seed``, which imports torch.
    """
    random.seed(seed)
    np.random.seed(seed)
    generator.seed_both(seed)


def _torch() -> Any:
    torch = sys.modules.get("torch")
    return torch if hasattr(torch, "get_rng_state") else None
