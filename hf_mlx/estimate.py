"""What a run would do and need, before it starts."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from mlx.utils import tree_flatten

from .data.buckets import bucket_length

# Bytes a block keeps for its backward pass, per token, hidden unit and byte of the activation dtype: Korthikanti et
# al. 2022, "Reducing Activation Recomputation", eq. 2 without the attention matrix, which fused attention recomputes:
# 34 bytes at 2 bytes a number.
_KEPT = 17
_LOGIT_COPIES = 2  # fp32 logits and their gradient


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a training step.

    Attributes:
        weights: Everything the model holds, as it is stored.
        gradients: One number for each trainable one, in its dtype.
        optimizer: The optimizer's state.
        activations: What the blocks keep for the backward pass of the longest micro-batch.
        logits: fp32 logits of that micro-batch and their gradient.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(getattr(self, field.name) for field in fields(self))


def estimate_memory(trainer: Any) -> Memory:
    """Peak memory of one training step, from shapes alone.

    An upper estimate within a small factor: allocator caches, the compiled graph's temporaries and, for a torch
    object, the torch weights themselves come on top.

    Args:
        trainer: An :class:`~hf_mlx.MLXSFTTrainer`.
    """
    session, plan = trainer.session, trainer.plan
    config = trainer.model.config.get_text_config()
    tokens = plan.batch.train_batch_size * longest_row(trainer)
    width = 2 if plan.model.precision.autocast or plan.model.precision.dtype in ("bfloat16", "float16") else 4
    per_block = _KEPT * width * tokens * config.hidden_size
    if plan.checkpointing.enabled:
        # Every block keeps its input, and one block at a time is computed again.
        activations = width * tokens * config.hidden_size * config.num_hidden_layers + per_block
    else:
        activations = per_block * config.num_hidden_layers
    return Memory(
        weights=_bytes(session.loaded.model.parameters()),
        gradients=_bytes(session.step.params),
        optimizer=_bytes(session.step.state),
        activations=activations,
        logits=_LOGIT_COPIES * 4 * tokens * config.vocab_size,
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


def _bytes(tree: Any) -> int:
    flat: dict[str, Any] = dict(tree_flatten(tree))
    return sum(value.nbytes for value in flat.values() if hasattr(value, "nbytes"))


def _show(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
