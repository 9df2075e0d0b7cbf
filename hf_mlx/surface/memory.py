"""MLX's memory, stage by stage, under the names that transformers reports a GPU's."""

from __future__ import annotations

import mlx.core as mx


class MemoryMeter:
    """Measures what each stage of a trainer allocates, in bytes.

    Source: transformers 5.23 ``TrainerMemoryTracker``: its ``*_mem_gpu_*`` keys, with what ``__init__`` took reported
    by the first stage after it. Memory is unified here, so there are no ``*_mem_cpu_*`` keys.

    ``train_mem_gpu_peak`` is added to upstream's keys: the most that MLX held at once.

    Args:
        enabled: ``not args.skip_memory_metrics``.
    """

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._stage: str | None = None
        self._before = 0
        self._init: dict[str, float] = {}

    def start(self, stage: str) -> None:
        """Begin ``"init"``, ``"train"``, ``"eval"`` or ``"test"``; an evaluation within training counts as training."""
        if self._stage is not None:
            return
        if self._enabled:
            self._stage, self._before = stage, mx.get_active_memory()
        if self._enabled or stage == "train":
            mx.reset_peak_memory()

    def stop(self, stage: str, metrics: dict[str, float] | None = None) -> None:
        """End the stage that ``start`` began, and add what it measured to ``metrics``."""
        if self._stage != stage:
            return
        self._stage = None
        now, peak = mx.get_active_memory(), mx.get_peak_memory()
        measured: dict[str, float] = {
            f"{stage}_mem_gpu_alloc_delta": now - self._before,
            f"{stage}_mem_gpu_peaked_delta": max(0, peak - now),
        }
        if stage == "train":
            measured["train_mem_gpu_peak"] = peak
        if metrics is None:
            self._init = {**measured, "before_init_mem_gpu": self._before}
        else:
            metrics |= {**self._init, **measured}
            self._init = {}
