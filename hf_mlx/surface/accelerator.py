"""``trainer.accelerator``: what scripts ask of accelerate, answered for one process on one device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .facade import Device


class Accelerator:
    """The part of ``accelerate.Accelerator`` that scripts use around a trainer.

    Attributes:
        is_main_process, is_local_main_process, is_last_process: True.
        process_index, local_process_index: 0.
        num_processes: 1.
        device: ``"cpu"``: where inputs are handed over.
        mixed_precision: ``"bf16"`` under autocast, else ``"no"``.
        gradient_accumulation_steps: Of the run.
    """

    is_main_process = is_local_main_process = is_last_process = True
    process_index = local_process_index = 0
    num_processes = 1
    use_distributed = False
    sync_gradients = True
    distributed_type = "NO"

    def __init__(
        self,
        *,
        mixed_precision: str = "no",
        gradient_accumulation_steps: int = 1,
        seedable_sampler: bool = True,
        data_seed: int | None = None,
    ) -> None:
        self.use_seedable_sampler = seedable_sampler
        self._data_seed = data_seed
        self.device = Device("cpu")
        self.mixed_precision = mixed_precision
        self.gradient_accumulation_steps = gradient_accumulation_steps

    def print(self, *args: Any, **kwargs: Any) -> None:
        """``print``, once."""
        print(*args, **kwargs)

    def wait_for_everyone(self) -> None:
        """There is nobody else."""

    def prepare(self, *objects: Any, device_placement: Any = None) -> Any:
        """What training needs of ``objects``: nothing, but that loaders shuffle by the run's seed as upstream's do."""
        import torch

        made = [self.prepare_data_loader(o) if isinstance(o, torch.utils.data.DataLoader) else o for o in objects]
        return made[0] if len(made) == 1 else tuple(made)

    def prepare_data_loader(self, data_loader: Any, **options: Any) -> Any:
        """accelerate's own wrapper of a loader, for one process."""
        from accelerate.data_loader import prepare_data_loader

        return prepare_data_loader(
            data_loader,
            num_processes=1,
            process_index=0,
            use_seedable_sampler=self.use_seedable_sampler,
            data_seed=self._data_seed,
        )

    def unwrap_model(self, model: Any, keep_fp32_wrapper: bool = True, keep_torch_compile: bool = True) -> Any:
        """The model, which is never wrapped."""
        return model

    def gather(self, tensor: Any) -> Any:
        """The tensor: one process holds it all."""
        return tensor

    gather_for_metrics = gather

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Runs the block."""
        yield

    local_main_process_first = main_process_first

    def free_memory(self, *objects: Any) -> list[Any]:
        """Empty MLX's cache and let go of ``objects``."""
        import mlx.core as mx

        mx.clear_cache()
        return [None] * len(objects)

    def end_training(self) -> None:
        """Trackers are the callbacks' own business."""
