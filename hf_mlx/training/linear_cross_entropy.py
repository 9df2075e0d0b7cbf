"""Cross-entropy of a vocabulary projection, a block of tokens at a time: all logits never exist at once.

The gradient with respect to the hidden states (and to the projection's weights, where they train) is taken in the
same pass, while a block's logits are there; the backward pass only multiplies it by the incoming cotangent. Blocks
are chained, so that one block's logits are gone before the next ones are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from ..settings.plan import LossPlan
from .loss import TokenSums, sums_and_gradient, token_sums

# Logits of one block. In float32 that is 128 MiB an array, and a product of that size nearly fills a large GPU.
BLOCK_LOGITS = 1 << 25
# The fewest rows of a block: below it the projection's weights are read more often than they are worth.
BLOCK_ROWS = 256

# Hidden states (N, H) and the trained arrays of the head -> logits (N, V).
Projection = Callable[[mx.array, Sequence[mx.array]], mx.array]
# Logits (N, V) of the projection -> those of the model.
Finish = Callable[[mx.array], mx.array]


def block_rows(tokens: int, vocabulary: int) -> int:
    """Tokens of a block: a power of two, at least 256; ``tokens`` itself when everything fits into one block.

    Args:
        tokens: Scored positions of the micro-batch.
        vocabulary: Width of the logits.
    """
    fitting = BLOCK_LOGITS // vocabulary
    return min(tokens, max(BLOCK_ROWS, 1 << fitting.bit_length() >> 1))


def linear_token_sums(
    project: Projection,
    hidden: mx.array,
    weights: Sequence[mx.array],
    targets: mx.array,
    plan: LossPlan,
    *,
    rows: int,
    gradient: bool = True,
    finish: Finish = lambda logits: logits,
) -> TokenSums:
    """:func:`~hf_mlx.training.loss.token_sums` of ``finish(project(hidden, weights))``, ``rows`` tokens at a time.

    Args:
        project: Pure; everything that trains in it comes through ``weights``.
        hidden: (N, H), any float dtype; its gradient comes back in the same dtype.
        weights: Trained arrays of the projection; empty when the head is frozen. Their gradients are products over
            :func:`group_rows` tokens each, summed in float32.
        targets: (N,) int32, ``-100`` where a token does not count.
        plan: Which loss.
        rows: Tokens of a block; see :func:`block_rows`.
        gradient: False, for evaluation, leaves the gradients out; the result is then not differentiable.
        finish: What single logits go through after the projection: scale and softcap.

    Returns:
        Differentiable in ``hidden`` and ``weights`` through ``loss`` alone: entropy and correct are metrics.
    """
    tokens = targets.shape[0]
    if not gradient:
        total = _zeros()
        for start in range(0, tokens, rows):
            block = mx.depends([hidden[start : start + rows]], list(total))[0]
            logits = finish(project(block, weights))
            total = _add(total, token_sums(logits, targets[start : start + rows], plan))
        return total

    def forward(hidden: mx.array, *weights: mx.array) -> tuple[mx.array, ...]:
        total, by_hidden, by_weights = _zeros(), [], []
        length = group_rows(rows, tokens, project(hidden[:1], weights).nbytes, weights)
        for first in range(0, tokens, length):
            group = hidden[first : first + length]
            by_logits: list[mx.array] = []
            for start in range(0, group.shape[0], rows):
                before = [*total, *by_hidden[-1:], *by_logits, *by_weights]
                block = mx.depends([group[start : start + rows]], before)[0]
                counted = targets[first + start : first + start + block.shape[0]]
                sums, slope = _block(finish, project(block, weights), counted, plan)
                total = _add(total, sums)
                by_hidden += _pull(lambda block: project(block, weights), [block], slope)
                by_logits = _put(by_logits, slope, start, group.shape[0]) if weights else []
            if weights:
                summed = _pull(lambda *weights, group=group: project(group, weights), weights, *by_logits)
                wide = by_weights or [mx.zeros(())] * len(weights)
                by_weights = (
                    summed
                    if length >= tokens
                    else [a + b.astype(mx.float32) for a, b in zip(wide, summed, strict=True)]
                )
        by_weights = [g.astype(w.dtype) for g, w in zip(by_weights, weights, strict=True)]
        return (*total, mx.concatenate(by_hidden), *by_weights)

    def backward(primals, cotangents, outputs):
        scale = cotangents[0]
        return tuple((scale * g.astype(mx.float32)).astype(g.dtype) for g in outputs[3:])

    summed: Any = mx.custom_function(forward)
    summed.vjp(backward)
    return TokenSums(*summed(hidden, *weights)[:3])


def group_rows(rows: int, tokens: int, logit_bytes: int, weights: Sequence[mx.array]) -> int:
    """Tokens whose gradients by the logits are kept until one product gives those by ``weights``.

    They take no more memory than float32 sums of the weights' gradients would: thousands of tokens where a whole
    projection trains, one block where an adapter does.

    Args:
        rows: Tokens of a block.
        tokens: Of the micro-batch.
        logit_bytes: Logits of one token.
        weights: The trained arrays.
    """
    fitting = 4 * sum(weight.size for weight in weights) // logit_bytes
    return min(max(fitting // rows, 1) * rows, tokens)


def _block(finish: Finish, logits: mx.array, targets: mx.array, plan: LossPlan) -> tuple[TokenSums, mx.array]:
    """Sums of one block, and their gradient by its unfinished logits."""
    finished = finish(logits)
    sums, by_finished = sums_and_gradient(finished, targets, plan)
    return sums, _pull(finish, [logits], by_finished.astype(finished.dtype))[0]


def _pull(function: Callable[..., mx.array], primals: Sequence[mx.array], cotangent: mx.array) -> list[mx.array]:
    """The vector-Jacobian products of ``function``; its value is never computed for them where it is linear."""
    return mx.vjp(function, list(primals), [cotangent])[1]


def _put(kept: list[mx.array], slope: mx.array, start: int, length: int) -> list[mx.array]:
    """``slope`` as rows from ``start`` of the (length, V) array in ``kept``, which is made for the first of several."""
    if slope.shape[0] == length:
        return [slope]
    (whole,) = kept or [mx.zeros((length, slope.shape[1]), slope.dtype)]
    whole[start : start + slope.shape[0]] = slope
    return [whole]


def _zeros() -> TokenSums:
    return TokenSums(mx.array(0.0), mx.array(0.0), mx.array(0.0))


def _add(a: TokenSums, b: TokenSums) -> TokenSums:
    return TokenSums(*(x + y for x, y in zip(a, b, strict=True)))
