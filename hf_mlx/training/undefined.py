"""The loss of micro-batches without a trained token, as trl 1.16 and transformers 5.23 log it.

``SFTTrainer.compute_loss`` divides by at least one token, so such a micro-batch has the loss 0. Label smoothing does
not go that way: ``LabelSmoother`` divides by the count as it is, and 0 / 0 is NaN, with gradients that are 0 all the
same. ``Trainer._run_epoch`` then logs the mean of the losses since the last log in its place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx

from ..settings.plan import AnyLossPlan, LossPlan
from .inputs import Inputs
from .measured import StepMetrics
from .step import Step, read_scalar
from .weighting import ByTokens


def is_undefined(plan: AnyLossPlan, tokens: int) -> bool:
    """Whether upstream's loss over ``tokens`` trained tokens is 0 / 0."""
    if not isinstance(plan, LossPlan):
        return False
    smoothed = plan.kind == "nll" and plan.label_smoothing_factor > 0
    return tokens == 0 and (plan.divides_by_none or smoothed)


def settle_undefined(
    metrics: StepMetrics, window: Sequence[Inputs], step: Step, pending: Sequence[StepMetrics], *, filtered: bool
) -> StepMetrics:
    """``metrics`` with what upstream logs for the micro-batches of ``window`` whose loss is 0 / 0.

    Args:
        metrics: Of the window, where such a loss counts 0.
        window: Its micro-batches.
        step: That computed them.
        pending: Metrics of the steps since the last log. Read where there is such a loss, and only there.
        filtered: ``logging_nan_inf_filter``.
    """
    plan, weigh = step.objective.plan, step.weigh
    if not isinstance(weigh, ByTokens):
        return metrics
    if weigh.accepts_loss_kwargs:
        count = len(window) if is_undefined(plan, weigh.count(window)) else 0
    else:
        count = sum(is_undefined(plan, micro.valid) for micro in window)
    if not count:
        return metrics
    if not filtered:
        return replace(metrics, loss=mx.array(math.nan))
    # Each adds the mean of what there is so far.
    total = sum(read_scalar(made.loss) for made in (*pending, metrics))
    grown = total * (1 + 1 / (1 + len(pending))) ** count
    return replace(metrics, loss=metrics.loss + (grown - total))
