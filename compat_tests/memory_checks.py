"""What a step takes at its peak, beside the estimate."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from hf_mlx.surface.estimate import estimate_memory


def peak_of_a_step(trainer: Any) -> int:
    """Bytes at the peak of the second step of a window that repeats."""
    step = trainer.session.step
    window = [trainer.data.inputs(next(iter(trainer.data.train_loader(trainer.train_dataset))))]
    trainer.session.loaded.model.train()
    for number in (1, 2):
        mx.clear_cache()
        mx.synchronize()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        step(window, number, 1e-4)
        mx.eval(step.params, step.state)
    own = estimate_memory(trainer)
    # What other tests of this process still hold is not this trainer's.
    return mx.get_peak_memory() - before + own.weights + own.reference + own.optimizer
