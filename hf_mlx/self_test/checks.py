"""The checks themselves; each yields what it looked at and a number."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..device import on_cpu
from . import mixture, reference
from .materials import LORA, SETTINGS, rows, write_model
from .report import Measured
from .scripts import train_language, train_pairs

# fp32 on both sides and sums in another order: 1e-6 on a CPU; a GPU's exponentials and products add some.
FP32 = 1e-4
# TF32 keeps 10 bits; MLX multiplies fp32 matrices so on GPUs that can, unless told otherwise.
TF32 = 5e-3
# bf16 keeps 8 bits: kernels round sums of products otherwise, and a norm of rounded gradients moves more than a loss.
BF16, BF16_NORM = 1e-2, 5e-2
PRODUCTS = 1e-3
SPEED: dict[str, Any] = {"rows": 4, "length": 256, "steps": 4}

Found = Iterator[tuple[str, Measured]]


def fp32_limit() -> float:
    """The limit for what is computed in fp32 on this machine."""
    return FP32 if on_cpu() or os.environ.get("MLX_ENABLE_TF32") == "0" else TF32


def against_trl(folder: Path, *, bf16: bool) -> Found:
    """Losses and gradient norms of six LoRA steps beside TRL's."""
    kind = "BF16" if bf16 else "FP32"
    limits = (BF16, BF16_NORM) if bf16 else (fp32_limit(), fp32_limit())
    yield from _beside(_train(folder, bf16=bf16), kind, limits, "relative to TRL")


def preferences(folder: Path) -> Found:
    """The same of MLXDPOTrainer, beside trl's DPOTrainer."""
    from ..trainers.dpo import MLXDPOTrainer

    with _quietly():
        trainer = train_pairs(MLXDPOTrainer, folder)
    yield from _beside(trainer, "PAIRS", (fp32_limit(), fp32_limit()), "relative to TRL")


def language(folder: Path) -> Found:
    """The same of MLXTrainer with all weights, beside transformers' Trainer."""
    from ..trainers.lm import MLXTrainer

    with _quietly():
        trainer = train_language(MLXTrainer, folder)
    yield from _beside(trainer, "LANGUAGE", (fp32_limit(), fp32_limit()), "relative to transformers")


def _beside(trainer: Any, kind: str, limits: tuple[float, float], unit: str) -> Found:
    logged = [line for line in trainer.state.log_history if "grad_norm" in line]
    losses = _parted([line["loss"] for line in logged], getattr(reference, f"LOSSES_{kind}"))
    norms = _parted([line["grad_norm"] for line in logged], getattr(reference, f"NORMS_{kind}"))
    yield "losses of 6 steps", Measured(losses, limits[0], unit)
    yield "gradient norms", Measured(norms, limits[1], unit)


def packed(folder: Path) -> Found:
    """Documents packed into shared rows beside each document computed alone."""
    every: dict[str, Any] = {"per_device_train_batch_size": 24, "gradient_accumulation_steps": 1, "max_steps": 1}
    together = _train(folder / "together", **every, packing=True, max_length=64)
    # The adapter starts from zero, so that the first step's loss is the base model's.
    yield (
        "loss",
        Measured(_parted([_logged(together, "loss")], [_mean_loss(folder / "together")]), fp32_limit(), "of the loss"),
    )
    alone = _train(folder / "alone", **every)
    norms = [[_logged(trainer, "grad_norm")] for trainer in (together, alone)]
    yield "gradient norm", Measured(_parted(*norms), fp32_limit(), "relative to unpacked")


def quantised(folder: Path, *, bits: int, gradient: bool) -> Found:
    """A product with quantised weights, or its gradient, beside the same weights in fp64."""
    del folder
    random = np.random.RandomState(1)
    x = mx.array(random.standard_normal((24, 128)).astype(np.float32))
    weight = mx.array(random.standard_normal((64, 128)).astype(np.float32))
    packed, scales, *rest = mx.quantize(weight, group_size=64, bits=bits)
    dense = np.array(mx.dequantize(packed, scales, *rest, group_size=64, bits=bits)).astype(np.float64)

    def product(x: mx.array) -> mx.array:
        return mx.quantized_matmul(x, packed, scales, *rest, transpose=True, group_size=64, bits=bits)

    limit = max(PRODUCTS, fp32_limit())
    if gradient:
        _, (found,) = mx.vjp(product, [x], [mx.ones((24, 64))])
        exact = np.broadcast_to(dense.sum(axis=0), (24, 128))
    else:
        found, exact = product(x), np.array(x).astype(np.float64) @ dense.T
    yield "24 rows", Measured(_apart(np.array(found), exact), limit, "of the largest")


def experts(folder: Path) -> Found:
    """A mixture with an adapter, forwards and backwards, beside the same in fp64."""
    del folder
    given = mixture.draw()
    for name, found, right in zip(mixture.NAMES, mixture.ours(*given), mixture.exact(*given), strict=True):
        yield name, Measured(_apart(found, right), BF16, "of the largest")


def checkpoint(folder: Path) -> Found:
    """A run resumed from its third step ends as the run that was not interrupted."""
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
    whole = _train(folder / "whole", **saving)
    resumed = _train(folder / "resumed", resume=str(next((folder / "whole").glob("**/checkpoint-3"))), **saving)
    ends = [trainer.adapter.trainable() for trainer in (whole, resumed)]
    trained = [(np.array(value), np.array(ends[1][name])) for name, value in ends[0].items()]
    difference = max(float(np.abs(a - b).max()) for a, b in trained)
    yield "adapter after resuming", Measured(difference, 0.0, "difference")


def adapter(folder: Path) -> Found:
    """An adapter written and read again computes the same logits."""
    from ..adapters.read import import_adapter

    trainer = _train(folder)
    trainer.save_model(str(folder / "adapter"))
    base = folder / "model"
    again = import_adapter(folder / "adapter", base)
    ids = mx.array([rows(1)[0]])
    trained: Any = trainer.adapter.loaded.model
    trained.eval()
    ours, theirs = (np.array(model(ids).astype(mx.float32)) for model in (trained, again.loaded.model))
    yield "logits of the saved adapter", Measured(_apart(theirs, ours), fp32_limit(), "of the largest")


def speed(folder: Path) -> Found:
    """Tokens per second and memory of a larger model; told, not judged."""
    long = [[int(i % 120) + 3 for i in range(SPEED["length"])]] * SPEED["rows"] * SPEED["steps"]
    settings: dict[str, Any] = {"per_device_train_batch_size": SPEED["rows"], "gradient_accumulation_steps": 1}
    mx.reset_peak_memory()
    start = time.perf_counter()
    _train(folder, data=long, max_steps=SPEED["steps"], max_length=SPEED["length"], **settings)
    seconds = time.perf_counter() - start
    yield "with start-up", Measured(SPEED["rows"] * SPEED["steps"] * SPEED["length"] / seconds, None, "tokens/s")
    yield "memory", Measured(mx.get_peak_memory() / 2**20, None, "MiB at the most")


CHECKS: dict[str, Callable[[Path], Found]] = {
    "fp32 step": partial(against_trl, bf16=False),
    "bf16 step": partial(against_trl, bf16=True),
    "preference step": preferences,
    "step of all weights": language,
    "packed attention": packed,
    # One kernel each: on CUDA MLX compiles it here, which takes longer than all other checks together.
    "4-bit product": partial(quantised, bits=4, gradient=False),
    "4-bit gradient": partial(quantised, bits=4, gradient=True),
    "8-bit product": partial(quantised, bits=8, gradient=False),
    "8-bit gradient": partial(quantised, bits=8, gradient=True),
    "experts": experts,
    "checkpoint": checkpoint,
    "adapter": adapter,
    "speed of a tiny model": speed,
}


def _train(folder: Path, *, data: Sequence[list[int]] | None = None, resume: str | None = None, **changes: Any) -> Any:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig

    from ..trainers.sft import MLXSFTTrainer

    with _quietly():
        model = write_model(folder / "model")
        # The same device for torch's checks as MLX uses.
        args = SFTConfig(output_dir=str(folder / "out"), use_cpu=on_cpu(), **{**SETTINGS, **changes})
        dataset = Dataset.from_dict({"input_ids": list(data or rows())})
        trainer = MLXSFTTrainer(str(model), args, train_dataset=dataset, peft_config=LoraConfig(**LORA))  # pyright: ignore
        trainer.train(resume_from_checkpoint=resume)
    return trainer


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    level = logging.root.manager.disable
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)


def _logged(trainer: Any, key: str) -> float:
    return next(line[key] for line in trainer.state.log_history if key in line)


def _mean_loss(folder: Path) -> float:
    """Cross-entropy over all targets of all rows, each row computed alone, summed in fp64."""
    from ..models.load import load_model
    from ..settings.plan import ModelPlan

    model: Any = load_model(folder / "model", ModelPlan()).model
    total, targets = 0.0, 0
    for row in rows():
        logits = np.array(model(mx.array([row]))[0, :-1].astype(mx.float32)).astype(np.float64)
        shifted = logits - logits.max(axis=-1, keepdims=True)
        chosen = np.take_along_axis(shifted, np.array(row[1:])[:, None], axis=-1)[:, 0]
        total += float((np.log(np.exp(shifted).sum(axis=-1)) - chosen).sum())
        targets += len(row) - 1
    return total / targets


def _parted(ours: Sequence[float], theirs: Sequence[float]) -> float:
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} values where {len(theirs)} belong")
    return max(abs(float(a) - float(b)) / abs(float(b)) for a, b in zip(ours, theirs, strict=True))


def _apart(ours: np.ndarray, theirs: np.ndarray) -> float:
    # max() of Python would lose a NaN; numpy's keeps it.
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
