"""A loss of the script's own that is written for MLX: part of the compiled step."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from ..errors import SettingError
from ..models.sums import blocked_sum
from ..settings.plan import LossPlan
from .loss import IGNORED, TokenSums, token_sums
from .optimizers.contract import Arrays

# logits (R, W, V) float32, labels (R, W) int32, mask (R, W) bool -> losses (R, W).
NativeLoss = Callable[[mx.array, mx.array, mx.array], mx.array]


def native_sums(loss: NativeLoss, logits: mx.array, arrays: Arrays, plan: LossPlan) -> TokenSums:
    """Sums over the scored positions: the script's loss, and the metrics of every token loss.

    Args:
        loss: The script's.
        logits: (R, W, V).
        arrays: :attr:`hf_mlx.training.inputs.Inputs.arrays`.
        plan: Of the run; what it says of the loss is not read.

    Raises:
        SettingError: The function returns something else than a loss for each position.
    """
    targets = _spread(arrays)
    mask = targets != IGNORED
    made = loss(logits.astype(mx.float32), mx.where(mask, targets, 0), mask)
    if not isinstance(made, mx.array) or made.shape != targets.shape:
        found = f"shape {made.shape}" if isinstance(made, mx.array) else f"type {type(made).__name__}"
        raise SettingError(
            f"loss= with a result of {found}",
            f"one loss for each position, shape {targets.shape} here: they are summed where mask is True and divided "
            "by the scored tokens of the step",
            'mlx.nn.losses.cross_entropy(logits, labels, reduction="none")',
        )
    sums = token_sums(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), plan)
    return sums._replace(loss=blocked_sum(mx.where(mask, made, 0).astype(mx.float32).reshape(-1)))


def _spread(arrays: Arrays) -> mx.array:
    """The next token of every position or -100, (R, W)."""
    rows, width = arrays["input_ids"].shape
    targets = arrays["targets"]
    if "positions" in arrays:
        # Fillers point at position 0 with -100, which no token id is below.
        targets = mx.full((rows * width,), IGNORED, mx.int32).at[arrays["positions"]].maximum(targets)
    return targets.reshape(rows, width)
