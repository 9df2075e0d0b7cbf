"""Out of memory, out of buffers, stopped by macOS: how MLX says it, and what a user can do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from ..backends import WATCHDOG
from ..errors import HFMLXError, TrainingError
from ..settings.plan import TrainPlan
from .inputs import Inputs
from .memory import estimate_step, memory_limit, show_bytes
from .step import Step

# mlx 0.32.4: the CUDA allocator and runtime, and Metal's. Metal's limit of buffers is no lack of bytes.
_SAID = ("[malloc]", "[metal::malloc]", "out of memory", "Insufficient Memory", "Unable to allocate", "std::bad_alloc")


_STOPPED = ("Impacting Interactivity", "ImpactingInteractivity", "GPU Timeout", "CommandBufferCallbackErrorTimeout")
_BUFFERS = "Resource limit ("


class Work(NamedTuple):
    """What did not fit, what has to, and lines to write, any of which helps."""

    received: str
    required: str
    remedies: Sequence[str]


def is_shortage(error: BaseException) -> bool:
    """Whether ``error`` is MLX out of memory."""
    if isinstance(error, HFMLXError) or _BUFFERS in str(error):
        return False
    return isinstance(error, MemoryError) or any(said in str(error) for said in _SAID)


@contextmanager
def naming_shortage(describe: Callable[[], Work]) -> Iterator[None]:
    """Turn MLX's out-of-memory error into one that says what to write.

    The message has the words that accelerate's ``should_reduce_batch_size`` looks for, as torch's error has. What macOS
    stopped, and Metal's limit of buffers, are said likewise.

    Args:
        describe: What is under way; called when it fails.

    Raises:
        TrainingError: In place of MLX's error, which is its cause.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if (named := _name_metal(error, describe)) is not None:
            raise named from error
        if not is_shortage(error):
            raise
        received, required, remedies = describe()
        raise TrainingError(f"{received}: MLX is out of memory. ({error})", required, ", or ".join(remedies)) from error


def _name_metal(error: BaseException, describe: Callable[[], Work]) -> TrainingError | None:
    """What is no lack of memory, and smaller work helps all the same (mlx issues 3267 and 1712)."""
    text = str(error)
    if isinstance(error, HFMLXError):
        return None
    if any(said in text for said in _STOPPED):
        work = describe()
        return TrainingError(
            f"{work.received}: macOS stopped the GPU's work. ({text})",
            "work that does not hold up a display in use",
            "let the display sleep while it trains (caffeinate -s python train.py, or over ssh), keep "
            f"{WATCHDOG} unset or 1, or make the work smaller: {', or '.join(work.remedies)}",
        )
    if _BUFFERS in text:
        return TrainingError(
            f"{describe().received}: Metal counts too many buffers, whatever their size. ({text})",
            "fewer arrays alive at once",
            "gradient_checkpointing=True, or fewer layers with an adapter: LoraConfig(layers_to_transform=[...])",
        )
    return None


def describe_training(step: Step, plan: TrainPlan, config: Any, number: int, window: Sequence[Inputs]) -> Work:
    """A window of micro-batches as :class:`Work`.

    Args:
        step: That computes it.
        plan: What is already done to save memory.
        config: The model's, as transformers has it.
        number: Of the optimizer step.
        window: Its micro-batches.
    """
    rows, tokens = max((micro.arrays["input_ids"].shape for micro in window), key=math.prod)
    divisible, divided = not step.objective.whole, plan.auto_find_batch_size
    if divisible and divided:
        rows = 1
    needed = estimate_step(step, plan, config, rows, tokens).total
    remedies = []
    if rows > 1 and divisible:
        remedies.append("auto_find_batch_size=True, which computes it in pieces with the same curve")
    elif rows > 1:
        remedies.append(f"per_device_train_batch_size={max(rows // 2, 1)} with twice the gradient_accumulation_steps")
    if not plan.checkpointing.enabled:
        remedies.append("gradient_checkpointing=True")
    if plan.lora is None:
        remedies.append('peft_config=LoraConfig(target_modules="all-linear")')
    remedies.append(f"max_length={max(tokens // 2, 1)}")
    return Work(
        f"step {number}, {rows} row(s) x {tokens} tokens at once",
        f"that and one update fit in memory: estimated at {show_bytes(needed)}, of {show_bytes(memory_limit())}",
        remedies,
    )


def describe_evaluation(rows: int, tokens: int) -> Work:
    """A batch of an evaluation as :class:`Work`."""
    fewer = f"per_device_eval_batch_size={rows // 2}; auto_find_batch_size is for training alone, as upstream"
    return Work(
        f"an evaluation batch of {rows} row(s) x {tokens} tokens",
        f"it fits in memory ({show_bytes(memory_limit())}) beside the model and the optimizer's state",
        [fewer if rows > 1 else f"max_length={max(tokens // 2, 1)}"],
    )
