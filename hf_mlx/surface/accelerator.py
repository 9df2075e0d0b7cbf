"""``trainer.accelerator``: what scripts ask of accelerate, answered for MLX's own processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from ..errors import SettingError
from ..processes.world import World
from .facade import Device
from .gathering import cut, gather, pad, reduce
from .together import first


class UnknownAccelerate(SettingError, AttributeError):
    """Something of accelerate's that is not there; ``hasattr`` says so."""


class Accelerator:
    """The part of ``accelerate.Accelerator`` that scripts use around a trainer.

    Args:
        world: The processes; None for one.

    Attributes:
        is_main_process, is_local_main_process, is_last_process: Whether this is the first, the first of its machine,
            the last process.
        process_index, local_process_index: Which process this is, of all and of its machine.
        num_processes: How many there are.
        device: ``"cpu"``: where inputs are handed over.
        mixed_precision: ``"bf16"`` under autocast, else ``"no"``.
        gradient_accumulation_steps: Of the run.
    """

    sync_gradients = True
    distributed_type = "NO"

    def __init__(
        self,
        world: World | None = None,
        *,
        mixed_precision: str = "no",
        gradient_accumulation_steps: int = 1,
        seedable_sampler: bool = True,
        data_seed: int | None = None,
        split_batches: bool = False,
    ) -> None:
        self._world = world = world or World()
        self.num_processes, self.process_index, self.local_process_index = world.size, world.rank, world.local_rank
        self.is_main_process, self.is_local_main_process = world.is_main, world.is_local_main
        self.is_last_process = world.rank == world.size - 1
        self.use_distributed = not world.is_alone
        self.use_seedable_sampler = seedable_sampler
        self._data_seed, self.split_batches = data_seed, split_batches
        self.device = Device("cpu")
        self.mixed_precision = mixed_precision
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self._remainder = 0

    def print(self, *args: Any, **kwargs: Any) -> None:
        """``print``, once on each machine."""
        if self.is_local_main_process:
            print(*args, **kwargs)

    def wait_for_everyone(self) -> None:
        """Wait until every process is here."""
        self._world.barrier("accelerator.wait_for_everyone")

    def prepare(self, *objects: Any, device_placement: Any = None) -> Any:
        """What training needs of ``objects``: nothing, but that loaders shuffle by the run's seed as upstream's do."""
        import torch

        made = [self.prepare_data_loader(o) if isinstance(o, torch.utils.data.DataLoader) else o for o in objects]
        return made[0] if len(made) == 1 else tuple(made)

    def prepare_data_loader(self, data_loader: Any, **options: Any) -> Any:
        """accelerate's own wrapper of a loader, for this process's part of it."""
        from accelerate.data_loader import prepare_data_loader

        return prepare_data_loader(
            data_loader,
            num_processes=self.num_processes,
            process_index=self.process_index,
            split_batches=self.split_batches and self.use_distributed,
            use_seedable_sampler=self.use_seedable_sampler,
            data_seed=self._data_seed,
        )

    def unwrap_model(self, model: Any, keep_fp32_wrapper: bool = True, keep_torch_compile: bool = True) -> Any:
        """The model, which is never wrapped."""
        return model

    def gather(self, tensor: Any) -> Any:
        """The tensors of all processes, one after the other along their first dimension; nested ones likewise."""
        return gather(tensor, self._world)

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """The same, of several processes cut to the rows that are no repetition, where an epoch or evaluation ends."""
        gathered = self.gather(input_data)
        return cut(gathered, self._remainder) if self._remainder and self.use_distributed else gathered

    @contextmanager
    def ending(self, remainder: int) -> Iterator[None]:
        """A block in which a last round is at hand, of which ``remainder`` rows are no repetition; 0 for another."""
        self._remainder = remainder
        try:
            yield
        finally:
            self._remainder = 0

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """A block that the first process runs before the others do."""
        with first(self._world, local=False):
            yield

    @contextmanager
    def local_main_process_first(self) -> Iterator[None]:
        """A block that the first process of each machine runs before the others do."""
        with first(self._world):
            yield

    def get_state_dict(self, model: Any, unwrap: bool = True) -> dict[str, Any]:
        """``model.state_dict()``."""
        return model.state_dict()

    def log(self, values: dict[str, Any], step: int | None = None, log_kwargs: dict[str, Any] | None = None) -> None:
        """Nothing, as upstream's where the trainer has begun no tracker: ``trainer.log`` reaches those of report_to."""

    def get_tracker(self, name: str, unwrap: bool = False) -> Any:
        """accelerate's empty tracker, as upstream's where the trainer has begun none.

        Raises:
            ValueError: One of another name than ``"blank"`` (as accelerate's).
        """
        from accelerate.tracking import GeneralTracker

        return GeneralTracker(_blank=True)

    @property
    def state(self) -> Accelerator:
        """What accelerate keeps apart as its state: the same answers."""
        return self

    @property
    def trackers(self) -> list[Any]:
        """None: trackers are the callbacks' own business."""
        return []

    @contextmanager
    def accumulate(self, *models: Any) -> Iterator[None]:
        """Runs the block."""
        yield

    def on_main_process(self, function: Any = None) -> Any:
        """``function`` on the first process, and nothing on the others."""
        return _only(self.is_main_process, function)

    def on_local_main_process(self, function: Any = None) -> Any:
        """``function`` on the first process of each machine, and nothing on the others."""
        return _only(self.is_local_main_process, function)

    def on_last_process(self, function: Any = None) -> Any:
        """``function`` on the last process, and nothing on the others."""
        return _only(self.is_last_process, function)

    def autocast(self, autocast_handler: Any = None) -> Any:
        """A block in which nothing changes: MLX's models cast by themselves."""
        return nullcontext()

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """The sum, or with ``reduction="mean"`` the mean, over all processes; one process keeps its tensor.

        Raises:
            SettingError: Another reduction.
        """
        return reduce(tensor, self._world, reduction, scale)

    def pad_across_processes(self, tensor: Any, dim: int = 0, pad_index: int = 0, pad_first: bool = False) -> Any:
        """The tensor as long along ``dim`` as the longest of all processes."""
        return pad(tensor, self._world, dim, pad_index, pad_first)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise UnknownAccelerate(
            f"trainer.accelerator.{name}",
            "what accelerate has to say of one process that trains by itself",
            "leave it out: trainer.train() makes the steps, trainer.save_model(dir) and save_checkpoint() write",
        )

    def free_memory(self, *objects: Any) -> list[Any]:
        """Empty MLX's cache and let go of ``objects``."""
        import mlx.core as mx

        mx.clear_cache()
        return [None] * len(objects)

    def end_training(self) -> None:
        """Trackers are the callbacks' own business."""


def _only(runs: bool, function: Any) -> Any:
    if function is None:
        return lambda wrapped: _only(runs, wrapped)
    return function if runs else lambda *args, **kwargs: None
