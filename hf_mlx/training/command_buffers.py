"""How much work MLX hands to a CUDA device at once.

Temporaries live until the command buffer that uses them has run, and MLX lets ten buffers wait, so their size sets
the peak memory of a step. Metal's own limits are small already.
"""

from __future__ import annotations

import os

import mlx.core as mx

from ..settings.plan import TrainPlan

VARIABLES = ("MLX_MAX_OPS_PER_BUFFER", "MLX_MAX_MB_PER_BUFFER")
# MiB of arrays in a buffer: measured in docs/performance.md.
MEGABYTES = 200
MEGABYTES_CHECKPOINTED = 100


def limit_command_buffers(plan: TrainPlan) -> int | None:
    """Make MLX's CUDA device commit early, for less peak memory.

    MLX reads the limits once, when its device starts: nothing changes where the process has used the GPU already.
    The environment is left as it was, and a limit that the user has set stays.

    Args:
        plan: A run that recomputes its activations asked for less memory, and gets smaller buffers.

    Returns:
        The limit in MiB, or None where nothing was done.
    """
    if plan.use_cpu or not mx.cuda.is_available() or any(name in os.environ for name in VARIABLES):
        return None
    limit = MEGABYTES_CHECKPOINTED if plan.checkpointing.enabled else MEGABYTES
    os.environ["MLX_MAX_MB_PER_BUFFER"] = str(limit)
    try:
        mx.eval(mx.zeros(1) + 1)
    finally:
        del os.environ["MLX_MAX_MB_PER_BUFFER"]
    return limit
