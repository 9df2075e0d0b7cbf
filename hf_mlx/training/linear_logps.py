"""Log-probabilities of the tokens that are scored, a block of tokens at a time: all logits never exist at once.

Unlike a summed loss, each token's log-probability has a cotangent of its own. Where the vocabulary projection is
frozen, a block's gradient by its hidden states is taken while its logits are there, and the backward pass multiplies it
by the tokens' cotangents; where the projection trains, blocks are computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from .exponential import exponential
from .linear_cross_entropy import Projection
from .loss import IGNORED
from .sums import blocked_sum


class TokenLogps(NamedTuple):
    """What is known of each scored token, (N,) float32; 0 where the target is -100. Gradients flow through ``logp``.

    Attributes:
        logp: Log-probability of the target.
        entropy: Of the distribution, in nats.
        mean_logit: Over the vocabulary.
        correct: 1 where the target is the likeliest token.
        log_square_sum: Log of the sum of squared probabilities, which WPO aligns by.
    """

    logp: mx.array
    entropy: mx.array
    mean_logit: mx.array
    correct: mx.array
    log_square_sum: mx.array


def token_logps(logits: mx.array, targets: mx.array) -> TokenLogps:
    """:class:`TokenLogps` of logits (N, V), any float dtype, and targets (N,) int32."""
    logits = logits.astype(mx.float32)
    counted, safe, normaliser, exponentials, total = _normalise(logits, targets)
    logp = mx.take_along_axis(logits, safe[:, None], axis=-1).squeeze(-1) - normaliser
    return _collect(logp, mx.stop_gradient(logits), counted, safe, normaliser, exponentials, total)


def linear_token_logps(
    project: Projection,
    hidden: mx.array,
    weights: Sequence[mx.array],
    targets: mx.array,
    *,
    rows: int,
    gradient: bool = True,
) -> TokenLogps:
    """:func:`token_logps` of ``project(hidden, weights)``, ``rows`` tokens at a time.

    Args:
        project: Pure; everything that trains in it comes through ``weights``.
        hidden: (N, H), any float dtype; its gradient comes back in the same dtype.
        weights: The trained arrays of the projection.
        targets: (N,) int32, ``-100`` where a token does not count.
        rows: Tokens of a block.
        gradient: False, for evaluation and the reference, leaves gradients out.
    """
    starts = range(0, targets.shape[0], rows)

    def block(hidden: mx.array, *weights: mx.array, start: int) -> TokenLogps:
        return token_logps(project(hidden, weights), targets[start : start + rows])

    def chain(run: Any) -> list[Any]:
        """One block after the other, so that the logits of one are gone before those of the next are made."""
        done: list[Any] = []
        for start in starts:
            part = hidden[start : start + rows]
            done.append(run(mx.depends([part], list(done[-1]))[0] if done else part, start))
        return done

    if not gradient:
        return _join(chain(lambda part, start: block(part, *weights, start=start)))
    if weights:
        again: Any = mx.checkpoint(lambda part, *w, start: tuple(block(part, *w, start=start)))
        return _join([TokenLogps(*again(hidden[s : s + rows], *weights, start=s)) for s in starts])

    def forward(hidden: mx.array) -> tuple[mx.array, ...]:
        parts, slopes = [], []
        for start in starts:
            part = hidden[start : start + rows]
            if parts:
                part = mx.depends([part], [*parts[-1], slopes[-1]])[0]
            values, slope = _block_and_slope(project, part, targets[start : start + rows])
            parts.append(values)
            slopes.append(slope)
        return (*_join(parts), mx.concatenate(slopes))

    def backward(primals, cotangents, outputs):
        slope = outputs[-1]
        return (cotangents[0][:, None] * slope.astype(mx.float32)).astype(slope.dtype)

    blocked: Any = mx.custom_function(forward)
    blocked.vjp(backward)
    return TokenLogps(*blocked(hidden)[:-1])


def _block_and_slope(project: Projection, hidden: mx.array, targets: mx.array) -> tuple[TokenLogps, mx.array]:
    """The values of one block, and the gradient of each token's logp by its own hidden state, (N, H)."""

    def surrogate(hidden: mx.array) -> tuple[mx.array, TokenLogps]:
        logits = project(hidden, ())
        fixed = mx.stop_gradient(logits).astype(mx.float32)
        counted, safe, normaliser, exponentials, total = _normalise(fixed, targets)
        logp = mx.take_along_axis(fixed, safe[:, None], axis=-1).squeeze(-1) - normaliser
        is_target = (mx.arange(logits.shape[-1]) == safe[:, None]).astype(mx.float32)
        by_logits = (is_target - exponentials * (1 / total)[:, None]) * counted[:, None].astype(mx.float32)
        values = _collect(logp, fixed, counted, safe, normaliser, exponentials, total)
        # Tokens do not depend on each other, so one product gives the gradient of each by its own hidden state.
        return (logits.astype(mx.float32) * by_logits).sum(), values

    (_, values), slope = mx.value_and_grad(surrogate)(hidden)
    return values, slope


def _normalise(logits: mx.array, targets: mx.array) -> tuple[mx.array, ...]:
    counted = targets != IGNORED
    safe = mx.where(counted, targets, 0)
    top = mx.stop_gradient(logits.max(axis=-1, keepdims=True))
    exponentials = exponential(logits - top)
    total = blocked_sum(exponentials)
    return counted, safe, mx.log(total) + top.squeeze(-1), exponentials, total


def _collect(
    logp: mx.array,
    logits: mx.array,
    counted: mx.array,
    safe: mx.array,
    normaliser: mx.array,
    exponentials: mx.array,
    total: mx.array,
) -> TokenLogps:
    normaliser, exponentials, total = map(mx.stop_gradient, (normaliser, exponentials, total))
    values = (
        logp,
        normaliser - blocked_sum(exponentials * logits) / total,
        blocked_sum(logits) / logits.shape[-1],
        (mx.argmax(logits, axis=-1) == safe).astype(mx.float32),
        mx.log(blocked_sum(mx.square(exponentials))) - 2 * mx.log(total),
    )
    return TokenLogps(*(mx.where(counted, value, 0.0) for value in values))


def _join(parts: Sequence[TokenLogps]) -> TokenLogps:
    return (
        parts[0] if len(parts) == 1 else TokenLogps(*(mx.concatenate(list(each)) for each in zip(*parts, strict=True)))
    )
