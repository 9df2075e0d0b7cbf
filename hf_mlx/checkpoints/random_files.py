"""The random states in a checkpoint folder: ``rng_state.pth``, and of several processes one for each."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.generator import TorchGenerator
from ..processes.world import World
from .inspection import count_processes
from .random_states import RandomStates
from .state_files import has_state, random_kind, read_state, write_state

logger = logging.getLogger(__name__)


def write_random(states: Sequence[RandomStates], folder: Path) -> None:
    """Write the states of all processes, by rank."""
    for rank, state in enumerate(states):
        write_state(state.to_hf(), folder, random_kind(rank, len(states)))


def read_random(folder: Path, run: Mapping[str, Any] | None, world: World, order: TorchGenerator) -> RandomStates:
    """The states that this process goes on from; those of now where the folder has none for it, as upstream.

    Args:
        folder: A checkpoint.
        run: What this library wrote into it, or None.
        world: The processes that go on.
        order: The run's generator.
    """
    written = count_processes(folder)
    if run is None and world.is_main and written not in (0, world.size):
        logger.warning(
            f"{folder.name} was written by {written} process(es), and {world.size} go on from it: a step is made of "
            "other rows, so the run goes on but not as it would have."
        )
    kind = random_kind(world.rank, world.size)
    if written not in (0, world.size) or not has_state(folder, kind):
        return RandomStates.capture(order)
    tree = None
    if run is not None:
        tree = (run.get("random") or [run["boundary"]["random"]])[world.rank]
    return RandomStates.from_files(read_state(folder, kind), tree)
