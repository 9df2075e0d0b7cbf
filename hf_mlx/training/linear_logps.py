"""Log-probabilities of the tokens that are scored, a block of tokens at a time: all logits never exist at once.

Unlike a summed loss, each token's log-probability has a cotangent of its own. Where the vocabulary projection is
frozen, a block's gradient by its hidden states is taken while its logits are there, and the backward pass multiplies it
by the tokens' cotangents; where the projection trains, blocks are computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from ..device import on_cpu
from .exponential import exponential
from .linear_cross_entropy import Projection
from .loss import IGNORED
from .sums import blocked_sum, sum_in_pieces


class TokenLogps(NamedTuple):
    """What is known of each scored token, (N,) float32; 0 where the target is -100. Gradients flow through ``logp``.

    Attributes:
        logp: Log-probability of the target.
        entropy: Of the distribution, in nats.
        mean_logit: Over the vocabulary.
        correct: 1 where the target is the likeliest token.
        log_square_sum: Log of the sum of squared probabilities, which WPO aligns by; 0 unless it is asked for.
    """

    logp: mx.array
    entropy: mx.array
    mean_logit: mx.array
    correct: mx.array
    log_square_sum: mx.array


def token_logps(logits: mx.array, targets: mx.array, *, squares: bool = False) -> TokenLogps:
    """:class:`TokenLogps` of logits (N, V), any float dtype, and targets (N,) int32."""
    counted, safe = _split_targets(targets)
    logp, normaliser, p = _softmax(logits, safe)
    return _collect(logp, logits, counted, safe, normaliser, p, squares)


def linear_logp(
    project: Projection, hidden: mx.array, weights: Sequence[mx.array], targets: mx.array, *, rows: int
) -> mx.array:
    """The ``logp`` of :func:`linear_token_logps` alone, (N,) float32, without gradients: what a reference is asked."""

    def block(part: mx.array, start: int) -> tuple[mx.array]:
        counted, safe = _split_targets(targets[start : start + rows])
        return (mx.where(counted, _softmax(project(part, weights), safe)[0], 0.0),)

    return mx.concatenate([logp for (logp,) in _chain(block, hidden, rows)])


def linear_token_logps(
    project: Projection,
    hidden: mx.array,
    weights: Sequence[mx.array],
    targets: mx.array,
    *,
    rows: int,
    gradient: bool = True,
    squares: bool = False,
) -> TokenLogps:
    """:func:`token_logps` of ``project(hidden, weights)``, ``rows`` tokens at a time.

    Args:
        project: Pure; everything that trains in it comes through ``weights``.
        hidden: (N, H), any float dtype; its gradient comes back in the same dtype.
        weights: The trained arrays of the projection.
        targets: (N,) int32, ``-100`` where a token does not count.
        rows: Tokens of a block.
        gradient: False, for evaluation, leaves gradients out.
        squares: Whether ``log_square_sum`` is asked for.
    """

    def block(hidden: mx.array, *weights: mx.array, start: int) -> TokenLogps:
        return token_logps(project(hidden, weights), targets[start : start + rows], squares=squares)

    if not gradient:
        return _join(_chain(lambda part, start: block(part, *weights, start=start), hidden, rows))
    if weights:
        again: Any = mx.checkpoint(lambda part, *w, start: tuple(block(part, *w, start=start)))
        return _join(
            [TokenLogps(*again(hidden[s : s + rows], *weights, start=s)) for s in range(0, targets.shape[0], rows)]
        )

    def forward(hidden: mx.array) -> tuple[mx.array, ...]:
        def with_slope(part: mx.array, start: int) -> tuple[mx.array, ...]:
            values, slope = _block_and_slope(project, part, targets[start : start + rows], squares)
            return (*values, slope)

        return tuple(mx.concatenate(list(part)) for part in zip(*_chain(with_slope, hidden, rows), strict=True))

    def backward(primals, cotangents, outputs):
        slope = outputs[-1]
        return (cotangents[0][:, None] * slope.astype(mx.float32)).astype(slope.dtype)

    blocked: Any = mx.custom_function(forward)
    blocked.vjp(backward)
    return TokenLogps(*blocked(hidden)[:-1])


def _chain(block: Callable[[mx.array, int], Iterable[mx.array]], hidden: mx.array, rows: int) -> list[Any]:
    """One block after the other, so that the logits of one are gone before those of the next are made."""
    done: list[Any] = []
    for start in range(0, hidden.shape[0], rows):
        part = hidden[start : start + rows]
        done.append(block(mx.depends([part], list(done[-1]))[0] if done else part, start))
    return done


def _block_and_slope(
    project: Projection, hidden: mx.array, targets: mx.array, squares: bool
) -> tuple[TokenLogps, mx.array]:
    """The values of one block, and the gradient of each token's logp by its own hidden state, (N, H)."""
    counted, safe = _split_targets(targets)

    def surrogate(hidden: mx.array) -> tuple[mx.array, TokenLogps]:
        logits = project(hidden, ())
        logp, normaliser, p = _softmax(logits, safe)
        values = _collect(logp, logits, counted, safe, normaliser, p, squares)
        # Tokens do not depend on each other, so one product gives the gradient of each by its own hidden state.
        if not on_cpu():
            return values.logp.sum(), values
        # Its gradient is the vector-Jacobian product with by_logits, of the one softmax; its value is never computed.
        is_target = (mx.arange(logits.shape[-1]) == safe[:, None]).astype(mx.float32)
        by_logits = mx.stop_gradient((is_target - p) * counted[:, None].astype(mx.float32))
        return (logits.astype(mx.float32) * by_logits).sum(), values

    (_, values), slope = mx.value_and_grad(surrogate)(hidden)
    return values, slope


def _split_targets(targets: mx.array) -> tuple[mx.array, mx.array]:
    """Which targets count, and an id for each."""
    counted = targets != IGNORED
    return counted, mx.where(counted, targets, 0)


def _softmax(logits: mx.array, safe: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Log-probability of the ids (N,), log of the sum of exponentials (N,), and all probabilities (N, V); float32.

    Gradients flow through the first alone.
    """
    if not on_cpu():
        # One kernel, and one for the gradient, which reads the logits in their own dtype.
        logp = -mx.fast.cross_entropy(logits, safe)
        at = mx.take_along_axis(logits, safe[:, None], axis=-1).squeeze(-1).astype(mx.float32)
        normaliser = mx.stop_gradient(at - logp)
        return logp, normaliser, exponential(mx.stop_gradient(logits).astype(mx.float32) - normaliser[:, None])
    wide = logits.astype(mx.float32)
    at = mx.take_along_axis(wide, safe[:, None], axis=-1).squeeze(-1)
    top = mx.stop_gradient(wide.max(axis=-1, keepdims=True))
    exponentials = exponential(wide - top)
    total = blocked_sum(exponentials)
    normaliser = mx.log(total) + top.squeeze(-1)
    p = mx.stop_gradient(exponentials) * mx.stop_gradient(1 / total)[:, None]
    return at - normaliser, mx.stop_gradient(normaliser), p


def _collect(
    logp: mx.array,
    logits: mx.array,
    counted: mx.array,
    safe: mx.array,
    normaliser: mx.array,
    p: mx.array,
    squares: bool,
) -> TokenLogps:
    logits = mx.stop_gradient(logits)
    expected, total, square_sum = _sums(logits, normaliser, p, squares)
    values = (
        logp,
        normaliser - expected,
        total / logits.shape[-1],
        (mx.argmax(logits, axis=-1) == safe).astype(mx.float32),
        mx.zeros_like(normaliser) if square_sum is None else mx.log(square_sum),
    )
    return TokenLogps(*(mx.where(counted, value, 0.0) for value in values))


def _sums(
    logits: mx.array, normaliser: mx.array, p: mx.array, squares: bool
) -> tuple[mx.array, mx.array, mx.array | None]:
    """Over the vocabulary, each (N,): of ``p * logits``, of ``logits`` and, where asked for, of squared ``p``."""
    if on_cpu():
        wide = logits.astype(mx.float32)
        return blocked_sum(p * wide), blocked_sum(wide), blocked_sum(mx.square(p)) if squares else None
    # As in :func:`~hf_mlx.training.loss.sums_and_gradient`: each sum reads the logits themselves, one after the other.
    at = normaliser[:, None]
    expected = sum_in_pieces(lambda x: exponential(x.astype(mx.float32) - at) * x.astype(mx.float32), logits)
    again = mx.depends([logits], [expected])[0]
    total = sum_in_pieces(lambda x: x.astype(mx.float32), again)
    if not squares:
        return expected, total, None
    again = mx.depends([logits], [total])[0]
    return expected, total, sum_in_pieces(lambda x: exponential(2 * (x.astype(mx.float32) - at)), again)


def _join(parts: Sequence[TokenLogps]) -> TokenLogps:
    return (
        parts[0] if len(parts) == 1 else TokenLogps(*(mx.concatenate(list(each)) for each in zip(*parts, strict=True)))
    )
