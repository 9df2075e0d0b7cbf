"""accelerate and transformers, told of MLX's processes: by themselves they know those that torch has started."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..backends import prepare_backend
from ..processes.launcher import read_launcher
from .imports import Imports


def join_processes(imports: Imports) -> None:
    """Let HF's objects say what they would under torchrun, from the first that a script makes; for one process nothing.

    Args:
        imports: Where to wait for the script's imports.
    """
    if read_launcher() is None:
        return
    # MLX is imported as soon as accelerate is, which asks for the processes.
    prepare_backend()
    imports.after("accelerate.state", _count_processes)
    imports.after("accelerate.accelerator", _gather_together)
    imports.after("transformers.training_args", _wait_together)


def _count_processes(module: Any) -> None:
    from ..processes.world import the_world

    world, state = the_world(), module.PartialState
    begin = state.__init__

    @functools.wraps(begin)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        self.num_processes, self.process_index, self.local_process_index = world.size, world.rank, world.local_rank

    def wait_for_everyone(self: Any) -> None:
        world.barrier("wait_for_everyone")

    state.__init__, state.wait_for_everyone = __init__, wait_for_everyone


def _gather_together(module: Any) -> None:
    from ..processes.world import the_world
    from ..surface.gathering import gather, pad, reduce

    world = the_world()

    def gather_all(self: Any, tensor: Any) -> Any:
        return gather(tensor, world)

    def reduce_all(self: Any, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        return reduce(tensor, world, reduction, scale)

    def pad_all(self: Any, tensor: Any, dim: int = 0, pad_index: int = 0, pad_first: bool = False) -> Any:
        return pad(tensor, world, dim, pad_index, pad_first)

    made = {"gather": gather_all, "reduce": reduce_all, "pad_across_processes": pad_all}
    for name, method in made.items():
        setattr(module.Accelerator, name, method)


def _wait_together(module: Any) -> None:
    from ..processes.world import the_world
    from ..surface.together import first

    @contextmanager
    def main_process_first(self: Any, local: bool = True, desc: str = "work") -> Iterator[None]:
        with first(the_world(), local=local):
            yield

    module.TrainingArguments.main_process_first = main_process_first
