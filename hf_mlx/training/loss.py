"""The loss of a micro-batch and the metrics TRL logs beside it."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from ..device import on_cpu
from ..models.sums import blocked_sum
from ..settings.plan import LossPlan
from .exponential import exponential
from .sums import sum_in_pieces, sum_of

IGNORED = -100


class TokenSums(NamedTuple):
    """Sums over the trained tokens of a micro-batch; each a float32 scalar."""

    loss: mx.array
    entropy: mx.array
    correct: mx.array


def token_sums(logits: mx.array, targets: mx.array, plan: LossPlan, *, metrics: bool = True) -> TokenSums:
    """Cross-entropy, entropy and top-1 hits, summed over the tokens whose target is not ``-100``.

    The loss is trl 1.16 ``SFTTrainer.compute_loss``: ``-log p`` for nll; ``-p.detach() * log p`` for dft
    (DFT, https://huggingface.co/papers/2508.05629); with label smoothing, transformers 5.23
    ``trainer_pt_utils.LabelSmoother``: ``(1-eps) * nll + eps * mean over the vocabulary of -log p``.

    Args:
        logits: (N, V), any float dtype; reduced in float32.
        targets: (N,) int32, ``-100`` where a token does not count.
        plan: Which loss.
        metrics: False leaves entropy and correct at zero (they cost one more pass over the logits).
    """
    logits = logits.astype(mx.float32)
    counted = targets != IGNORED
    safe = mx.where(counted, targets, 0)
    # All below the largest: nothing then is a small difference of large numbers.
    below = logits - mx.stop_gradient(logits.max(axis=-1, keepdims=True))
    exponentials = exponential(below)
    total = blocked_sum(exponentials)
    log_total = mx.log(total)
    log_p = mx.take_along_axis(below, safe[:, None], axis=-1).squeeze(-1) - log_total
    loss = -log_p
    if plan.kind == "dft":
        loss = loss * mx.stop_gradient(mx.exp(log_p))
    elif plan.label_smoothing_factor:
        eps = plan.label_smoothing_factor
        loss = (1 - eps) * loss + eps * (log_total - blocked_sum(below) / logits.shape[-1])
    entropy = correct = mx.array(0.0)
    if metrics:
        mean = blocked_sum(mx.stop_gradient(exponentials) * mx.stop_gradient(below)) / mx.stop_gradient(total)
        entropy = blocked_sum(mx.where(counted, mx.stop_gradient(log_total) - mean, 0.0))
        correct = mx.where(counted, mx.argmax(mx.stop_gradient(logits), axis=-1) == safe, False).sum()
        correct = correct.astype(mx.float32)
    return TokenSums(blocked_sum(mx.where(counted, loss, 0.0)), entropy, correct)


def sums_and_gradient(logits: mx.array, targets: mx.array, plan: LossPlan) -> tuple[TokenSums, mx.array]:
    """:func:`token_sums` and the gradient of its loss with respect to the logits, from one softmax.

    Args:
        logits: (N, V), any float dtype; reduced in float32.
        targets: (N,) int32, ``-100`` where a token does not count.
        plan: Which loss.

    Returns:
        The sums, and the gradient (N, V) in float32: ``p - onehot`` for nll; the same times ``p`` of the target for
        dft; ``p - (1-eps) * onehot - eps / V`` with label smoothing; zero where a token does not count.
    """
    wide = logits.astype(mx.float32)
    vocabulary = logits.shape[-1]
    counted = targets != IGNORED
    safe = mx.where(counted, targets, 0)
    best = mx.argmax(logits, axis=-1)
    top = mx.take_along_axis(logits, best[:, None], axis=-1).astype(mx.float32)
    # All below the largest: nothing then is a small difference of large numbers.
    below = wide - top
    exponentials = exponential(below)
    if on_cpu():
        total, mean_sum = blocked_sum(exponentials), blocked_sum(exponentials * below)
    else:
        # Computed anew for each sum, so that no float32 array of all logits is written. Of passes over one and the
        # same array the compiler would find out what they share, and write that.
        total = sum_in_pieces(lambda x: exponential(x.astype(mx.float32) - top), logits)
        again = mx.depends([logits], [total])[0]
        mean_sum = sum_in_pieces(
            lambda x: exponential(x.astype(mx.float32) - top) * (x.astype(mx.float32) - top), again
        )
    log_total = mx.log(total)
    own = mx.take_along_axis(logits, safe[:, None], axis=-1).astype(mx.float32) - top
    log_p = own.squeeze(-1) - log_total
    p = exponentials * (1 / total)[:, None]
    is_target = (mx.arange(vocabulary) == safe[:, None]).astype(mx.float32)
    loss, scale, gradient = -log_p, counted.astype(mx.float32), p - is_target
    if plan.kind == "dft":
        target_p = mx.exp(log_p)
        loss, scale = loss * target_p, scale * target_p
    elif plan.label_smoothing_factor:
        eps = plan.label_smoothing_factor
        loss = (1 - eps) * loss + eps * (log_total - sum_of(lambda x: x.astype(mx.float32) - top, logits) / vocabulary)
        gradient = p - (1 - eps) * is_target - eps / vocabulary
    entropy = blocked_sum(mx.where(counted, log_total - mean_sum / total, 0.0))
    correct = mx.where(counted, best == safe, False).sum().astype(mx.float32)
    return TokenSums(blocked_sum(mx.where(counted, loss, 0.0)), entropy, correct), gradient * scale[:, None]
