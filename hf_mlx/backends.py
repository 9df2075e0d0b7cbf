"""What is done for each of MLX's backends, and why: one table, and what has to happen before MLX starts.

Numbers are the same everywhere. What differs is what a backend is slow at, lacks, or ends a process for.
"""

from __future__ import annotations

import logging
import os
import platform
import sys
from dataclasses import dataclass

from .blas import load_openblas, started_without_openblas

logger = logging.getLogger(__name__)

WATCHDOG = "AGX_RELAX_CDM_CTXSTORE_TIMEOUT"
#: The first macOS that keeps memory resident at MLX's request.
WIRES = (15, 0)
_LATE = (
    "mlx.core was imported before hf_mlx, so MLX on this CPU computes with its own reference BLAS, about 145x slower "
    "than OpenBLAS: put `from hf_mlx import MLXSFTTrainer` (any name of it) above the line that imports mlx or mlx_lm"
)


@dataclass(frozen=True)
class Measure:
    """One thing that is done for one backend.

    Attributes:
        backend: ``metal``, ``cuda`` or ``cpu`` (Linux).
        what: What is done.
        why: What happens without it, and who says so.
        where: The function or class that does it, below ``hf_mlx``.
        undo: How a user turns it off; empty where nothing would be gained.
    """

    backend: str
    what: str
    why: str
    where: str
    undo: str = ""


MEASURES = (
    Measure(
        "metal",
        f"`{WATCHDOG}=1` in the process's environment before MLX starts, unless it is set",
        "macOS ends GPU work that holds up an active display (`Impacting Interactivity`), LoRA training too "
        "(mlx issue 3267). The driver's own switch; it helped on most reported machines, not on all",
        "backends.prepare_backend",
        f"`{WATCHDOG}=0`",
    ),
    Measure(
        "metal",
        "memory up to the recommended working set is wired while a run is under way, and the earlier limit put back",
        "macOS pages out what is not wired, and each step waits for it; mlx-lm's own trainer does the same. Before "
        "macOS 15 there is no such call",
        "training.wired_memory.wired_memory",
    ),
    Measure(
        "metal",
        "while a run is under way MLX keeps at most as much freed memory as one step takes (estimated, times 1.5)",
        "MLX keeps freed arrays for others of their size, up to the working set, and wires them: with rows of many "
        "lengths that is the memory of every other program (mlx-lm pull request 986: 51 GiB where 7 were needed)",
        "training.wired_memory.bounded_cache",
        "a lower `mx.set_cache_limit(bytes)` stays",
    ),
    Measure(
        "metal",
        "a run plans for the recommended working set, less the factor that an estimate may be wrong by",
        "Metal does not say when memory runs out: the process ends without an exception",
        "training.memory.planned_limit",
        "`mx.set_memory_limit(bytes)` lowers it",
    ),
    Measure(
        "metal",
        "one graph a window, evaluated before the next; values that wait for a log entry are scalars",
        "Metal counts buffers as well as bytes, and MLX ends with `Resource limit (499000) exceeded`; its cache is "
        "emptied by MLX at the limit, so only what is alive counts",
        "loop.pending.Pending",
    ),
    Measure(
        "metal",
        "what macOS or Metal stopped is said as what to write",
        "`Impacting Interactivity`, `GPU Timeout` and `Resource limit` name no setting",
        "training.shortage.naming_shortage",
    ),
    Measure(
        "metal",
        "buffers of MLX's own size: `MLX_MAX_OPS_PER_BUFFER` and `MLX_MAX_MB_PER_BUFFER` are left alone",
        "40 to 50 operations and MiB there, which bounds both the time of a buffer and what it keeps alive",
        "training.command_buffers.limit_pending_work",
    ),
    Measure(
        "cuda",
        "`MLX_MAX_MB_PER_BUFFER` by the size of a micro-batch, before the device starts",
        "temporaries live until their buffer has run, and ten may wait: memory goes by their size",
        "training.command_buffers.limit_pending_work",
        "`MLX_MAX_MB_PER_BUFFER=…` or `MLX_MAX_OPS_PER_BUFFER=…`",
    ),
    Measure(
        "cuda",
        "a run with checkpointing waits for pending work rather than take more memory than its steps need",
        "MLX allocates ahead of what has run",
        "training.command_buffers.wait_for_memory",
    ),
    Measure(
        "cpu",
        "OpenBLAS in the place of the reference BLAS, loaded before MLX",
        "products are about 145 times slower without; binding happens once, at the import of mlx.core",
        "blas.load_openblas",
    ),
    Measure(
        "cpu",
        "the header of MLX's kernels is compiled beside the reading of data, once a machine: 35 MB in the folder where "
        "MLX keeps its kernels (`/tmp/mlx`)",
        "MLX has g++ build 50 kernels and more before the first step, and to read that header takes a second for each",
        "training.kernel_header.compiling_header",
    ),
    Measure(
        "cpu",
        "half-precision products through fp32",
        "MLX's own are about 15 times slower, and it has no gathered product in half precision",
        "models.products.matmul",
    ),
    Measure(
        "cpu",
        "rows of a micro-batch in lanes, one a core, each at most a part of the model ahead of the others",
        "all but matrix products run on one core, and few operations may wait, of all lanes together",
        "training.lanes.LanedStep",
    ),
    Measure(
        "cpu",
        "an exponential of our own in attention, in gated SiLU and in the softmax over the vocabulary, vectorised",
        "MLX's takes seven times as long, and is less exact",
        "training.exponential.exponential",
    ),
    Measure(
        "cpu",
        "RMSNorm and LayerNorm of our own in fp32 from 256 features on, forward and backward",
        "MLX's add a token's squares one after the other: at 4,096 features seven times as far from exact as torch's",
        "models.cpu_norms.add_exactly",
    ),
    Measure(
        "all",
        "on a GPU a norm's weight gets a gradient only where it trains; norms' and biases' are added up in float32",
        "MLX computes it with the input's, and adds half precision up in half precision",
        "training.norm_gradients.improve_norms",
    ),
    Measure(
        "all",
        "on a GPU a token's places are added up in float32 for a trained embedding in half precision, and an expert's "
        "rows for its bias",
        "MLX adds them up in half precision, where a sum of 256 equal terms stands still",
        "training.weight_gradients.look_up",
    ),
    Measure(
        "cpu",
        "decompositions of weights (PiSSA, OLoRA, CorDA) in numpy, on every backend",
        "MLX has them on the CPU alone, and fp64 too: Metal has neither",
        "adapters.decomposed.take_out",
    ),
    Measure(
        "all",
        "`MLX_BFS_MAX_WIDTH=1` at MLX's first evaluation",
        "a wide front begins more of a graph than it ends, and all of that is memory",
        "training.command_buffers.limit_pending_work",
        "`MLX_BFS_MAX_WIDTH=…`",
    ),
)


class _Once:
    """Whether this process was told that it is too late."""

    said = False


def prepare_backend() -> None:
    """What has to be in place before MLX starts: the driver's switch on a Mac, OpenBLAS on the Linux CPU.

    Called where a name is first used that needs MLX. Says once where it comes too late.
    """
    if sys.platform == "darwin" and platform.machine() == "arm64":
        os.environ.setdefault(WATCHDOG, "1")
    load_openblas()
    if not _Once.said and started_without_openblas():
        _Once.said = True
        logger.warning(_LATE)


def macos_version() -> tuple[int, int] | None:
    """The version of macOS, or None on another system."""
    if sys.platform != "darwin":
        return None
    numbers = [int(part) for part in platform.mac_ver()[0].split(".")[:2] if part.isdigit()]
    return (numbers[0], numbers[1] if len(numbers) > 1 else 0) if numbers else None


def markdown_measures() -> str:
    """The table as the documentation shows it."""
    names = {"metal": "Metal", "cuda": "CUDA", "cpu": "Linux CPU", "all": "every backend"}
    lines = []
    for backend, name in names.items():
        lines += [f"## {name}", "", "| what is done | why | turned off by |", "|---|---|---|"]
        lines += [f"| {one.what} | {one.why} | {one.undo or '—'} |" for one in MEASURES if one.backend == backend]
        lines.append("")
    return "\n".join(lines)
