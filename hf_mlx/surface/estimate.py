"""What a run would do and need, before it starts."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

from ..training.memory import MemoryEstimate, estimate_step, planned_limit, show_bytes
from ..training.splitting import halve


def estimate_memory(trainer: Any, rows: int | None = None) -> MemoryEstimate:
    """Peak memory of one training step, from shapes alone; see :func:`hf_mlx.training.memory.estimate`.

    Allocator caches, command buffers that wait on a GPU and, for a torch object, the torch weights themselves come
    on top.

    Args:
        trainer: An :class:`~hf_mlx.MLXSFTTrainer`.
        rows: That are computed at once; None for a whole micro-batch.
    """
    plan = trainer.plan
    examples = plan.batch.train_batch_size if rows is None else rows
    computed = trainer.recipe.rows.extent(trainer.train_dataset, examples, plan.data)
    return estimate_step(trainer.session.step, plan, trainer.model.config, *computed)


def describe_run(trainer: Any) -> str:
    """Plan, trainable parameters, steps and memory, as text."""
    plan, steps = trainer.plan, trainer.steps
    trained = trainer.get_num_trainable_parameters()
    held = trainer.model.num_parameters()
    memory = estimate_memory(trainer)
    sizes = ", ".join(f"{field.name} {show_bytes(getattr(memory, field.name))}" for field in fields(memory))
    parts = "\n".join(f"  {field.name}: {getattr(plan, field.name)}" for field in fields(plan))
    return (
        f"plan\n{parts}\n"
        f"trainable params: {trained:,d} || all params: {held:,d} || trainable%: {100 * trained / held:.4f}\n"
        f"steps: {steps.total_steps} ({steps.updates_per_epoch} an epoch, {steps.epochs} epoch(s), "
        f"{math.prod((plan.batch.train_batch_size, plan.batch.gradient_accumulation_steps))} rows each)\n"
        f"peak memory, estimated{_share(trainer)}: {show_bytes(memory.total)} ({sizes})\n"
        f"{_describe_pieces(trainer)}"
        "dry run: nothing was trained"
    )


def _share(trainer: Any) -> str:
    ways = trainer.plan.model.tensor_parallel
    return f" on each of {ways} processes" if ways > 1 else ""


def _describe_pieces(trainer: Any) -> str:
    if not trainer.plan.auto_find_batch_size or trainer.session.routers is not None:
        return ""
    rows, limit = trainer.plan.batch.train_batch_size, planned_limit()
    pieces = halve(rows, lambda most: estimate_memory(trainer, most).total <= limit)
    size = show_bytes(estimate_memory(trainer, math.ceil(rows / pieces)).total)
    return f"auto_find_batch_size: {pieces} piece(s) a micro-batch, {size} of {show_bytes(limit)}\n"
