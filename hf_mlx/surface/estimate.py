"""What a run would do and need, before it starts."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

from ..data.buckets import bucket_length
from ..training.memory import MemoryEstimate, estimate


def estimate_memory(trainer: Any) -> MemoryEstimate:
    """Peak memory of one training step, from shapes alone; see :func:`hf_mlx.training.memory.estimate`.

    Allocator caches, command buffers that wait on a GPU and, for a torch object, the torch weights themselves come
    on top.

    Args:
        trainer: An :class:`~hf_mlx.MLXSFTTrainer`.
    """
    session, plan = trainer.session, trainer.plan
    step = session.step
    return estimate(
        session.loaded.model,
        step.params,
        step.optimizer,
        plan,
        head=step.objective.head,
        attention_heads=trainer.model.config.get_text_config().num_attention_heads,
        rows=plan.batch.train_batch_size,
        tokens=longest_row(trainer),
    )


def longest_row(trainer: Any) -> int:
    """Length in tokens of the longest training row, in its bucket; ``max_length`` for a stream."""
    dataset = trainer.train_dataset
    if hasattr(dataset, "__len__"):
        return bucket_length(max((len(ids) for ids in dataset["input_ids"]), default=1), None)
    return trainer.plan.data.max_length or 1024


def describe_run(trainer: Any) -> str:
    """Plan, trainable parameters, steps and memory, as text."""
    plan, steps = trainer.plan, trainer.steps
    trained = sum(value.size for value in trainer.session.step.params.values())
    held = trainer.model.num_parameters()
    memory = estimate_memory(trainer)
    sizes = ", ".join(f"{field.name} {_show(getattr(memory, field.name))}" for field in fields(memory))
    parts = "\n".join(f"  {field.name}: {getattr(plan, field.name)}" for field in fields(plan))
    return (
        f"plan\n{parts}\n"
        f"trainable params: {trained:,d} || all params: {held:,d} || trainable%: {100 * trained / held:.4f}\n"
        f"steps: {steps.total_steps} ({steps.updates_per_epoch} an epoch, {steps.epochs} epoch(s), "
        f"{math.prod((plan.batch.train_batch_size, plan.batch.gradient_accumulation_steps))} rows each)\n"
        f"peak memory, estimated: {_show(memory.total)} ({sizes})\n"
        "dry run: nothing was trained"
    )


def _show(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
