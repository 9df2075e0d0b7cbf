"""Cross-entropy of a vocabulary projection, a block of tokens at a time: all logits never exist at once.

The gradient with respect to the hidden states (and to the projection's weights, where they train) is taken in the
same pass, while a block's logits are there; the backward pass only multiplies it by the incoming cotangent. Blocks
are chained, so that one block's logits are gone before the next ones are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from ..device import on_cpu
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
            :func:`trained_rows` tokens each, summed in float32.
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

    if weights:
        rows = trained_rows(rows, tokens, project(hidden[:1], weights).nbytes, weights)

    def forward(hidden: mx.array, *weights: mx.array) -> tuple[mx.array, ...]:
        total, by_hidden, by_weights = _zeros(), [], []
        for start in range(0, tokens, rows):
            before = [*total, *by_hidden[-1:], *by_weights]
            block = mx.depends([hidden[start : start + rows]], before)[0]
            logits = project(block, weights)
            sums, by_logits = _block(finish, logits, targets[start : start + rows], plan)
            total = _add(total, sums)
            by_hidden += _pull(lambda block: project(block, weights), [block], by_logits)
            if not weights:
                continue
            grads = _pull(lambda *weights, block=block: project(block, weights), weights, by_logits)
            if rows < tokens:
                wide = by_weights or [mx.zeros(())] * len(weights)
                grads = [a + g.astype(mx.float32) for a, g in zip(wide, grads, strict=True)]
            by_weights = grads
        by_weights = [g.astype(w.dtype) for g, w in zip(by_weights, weights, strict=True)]
        # Nothing else asks for them before the update, and what they are made of would be kept until then.
        whole = mx.depends([mx.concatenate(by_hidden)], by_weights)[0] if weights else mx.concatenate(by_hidden)
        return (*total, whole, *by_weights)

    def backward(primals, cotangents, outputs):
        scale = cotangents[0]
        return tuple((scale * g.astype(mx.float32)).astype(g.dtype) for g in outputs[3:])

    summed: Any = mx.custom_function(forward)
    summed.vjp(backward)
    return TokenSums(*summed(hidden, *weights)[:3])


def trained_rows(rows: int, tokens: int, logit_bytes: int, weights: Sequence[mx.array]) -> int:
    """Tokens of a block where the projection trains.

    On a GPU, where no float32 array of a block's logits is written, so many that the logits take half of what float32
    sums of the weights' gradients over the blocks do: thousands for a whole projection, whose gradient then is a few
    products. About eight arrays as large as a block's logits wait or are alive at once: with twice as many tokens they
    were the peak of a step with checkpointing. An adapter's blocks stay as they are.

    Args:
        rows: Tokens of a block of a frozen projection.
        tokens: Of the micro-batch.
        logit_bytes: Logits of one token.
        weights: The trained arrays.
    """
    fitting = 2 * sum(weight.size for weight in weights) // logit_bytes
    return rows if on_cpu() else min(max(fitting // rows, 1) * rows, tokens)


def _block(finish: Finish, logits: mx.array, targets: mx.array, plan: LossPlan) -> tuple[TokenSums, mx.array]:
    """Sums of one block, and their gradient by its unfinished logits."""
    finished = finish(logits)
    sums, by_finished = sums_and_gradient(finished, targets, plan)
    return sums, _pull(finish, [logits], by_finished.astype(finished.dtype))[0]


def _pull(function: Callable[..., mx.array], primals: Sequence[mx.array], cotangent: mx.array) -> list[mx.array]:
    """The vector-Jacobian products of ``function``; its value is never computed for them where it is linear."""
    return mx.vjp(function, list(primals), [cotangent])[1]


def _zeros() -> TokenSums:
    return TokenSums(mx.array(0.0), mx.array(0.0), mx.array(0.0))


def _add(a: TokenSums, b: TokenSums) -> TokenSums:
    return TokenSums(*(x + y for x, y in zip(a, b, strict=True)))
