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
) -> TokenSums:
    """:func:`~hf_mlx.training.loss.token_sums` of ``project(hidden, weights)``, ``rows`` tokens at a time.

    Args:
        project: Pure; everything that trains in it comes through ``weights``.
        hidden: (N, H), any float dtype; its gradient comes back in the same dtype.
        weights: Trained arrays of the projection; empty when the head is frozen. Their gradients are summed over
            the blocks in float32.
        targets: (N,) int32, ``-100`` where a token does not count.
        plan: Which loss.
        rows: Tokens of a block; see :func:`block_rows`.
        gradient: False, for evaluation, leaves the gradients out; the result is then not differentiable.

    Returns:
        Differentiable in ``hidden`` and ``weights`` through ``loss`` alone: entropy and correct are metrics.
    """
    starts = range(0, targets.shape[0], rows)
    if not gradient:
        total = _zeros()
        for start in starts:
            block = mx.depends([hidden[start : start + rows]], list(total))[0]
            total = _add(total, token_sums(project(block, weights), targets[start : start + rows], plan))
        return total

    def forward(hidden: mx.array, *weights: mx.array) -> tuple[mx.array, ...]:
        total, by_hidden, by_weight = _zeros(), [], [mx.zeros(w.shape) for w in weights]
        for start in starts:
            block = mx.depends([hidden[start : start + rows]], [*total, *by_hidden[-1:], *by_weight])[0]
            sums, grads = _block(project, block, weights, targets[start : start + rows], plan)
            total = _add(total, sums)
            by_hidden.append(grads[0])
            by_weight = [a + g.astype(mx.float32) for a, g in zip(by_weight, grads[1:], strict=True)]
        by_weight = [g.astype(w.dtype) for g, w in zip(by_weight, weights, strict=True)]
        return (*total, mx.concatenate(by_hidden), *by_weight)

    def backward(primals, cotangents, outputs):
        scale = cotangents[0]
        return tuple((scale * g.astype(mx.float32)).astype(g.dtype) for g in outputs[3:])

    summed: Any = mx.custom_function(forward)
    summed.vjp(backward)
    return TokenSums(*summed(hidden, *weights)[:3])


def _block(
    project: Projection, hidden: mx.array, weights: Sequence[mx.array], targets: mx.array, plan: LossPlan
) -> tuple[TokenSums, list[mx.array]]:
    """Sums of one block, and their gradients by hidden and by each weight."""

    def surrogate(inputs: list[mx.array]) -> tuple[mx.array, TokenSums]:
        logits = project(inputs[0], inputs[1:])
        sums, by_logits = sums_and_gradient(mx.stop_gradient(logits), targets, plan)
        # Its gradient is the vector-Jacobian product with by_logits; its value is never computed.
        return (logits.astype(mx.float32) * by_logits).sum(), sums

    (_, sums), grads = mx.value_and_grad(surrogate)([hidden, *weights])
    return sums, grads


def _zeros() -> TokenSums:
    return TokenSums(mx.array(0.0), mx.array(0.0), mx.array(0.0))


def _add(a: TokenSums, b: TokenSums) -> TokenSums:
    return TokenSums(*(x + y for x, y in zip(a, b, strict=True)))
