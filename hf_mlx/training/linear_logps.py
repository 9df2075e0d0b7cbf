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
from ..models.sums import blocked_sum
from .exponential import exponential
from .linear_cross_entropy import Projection
from .loss import IGNORED
from .sums import sum_in_pieces


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
    return _collect(_softmax(logits, safe), logits, counted, safe, squares)


def linear_logp(
    project: Projection, hidden: mx.array, weights: Sequence[mx.array], targets: mx.array, *, rows: int
) -> mx.array:
    """The ``logp`` of :func:`linear_token_logps` alone, (N,) float32, without gradients: what a reference is asked."""

    def block(part: mx.array, start: int) -> tuple[mx.array]:
        counted, safe = _split_targets(targets[start : start + rows])
        return (mx.where(counted, _softmax(project(part, weights), safe).logp, 0.0),)

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
        softmax = _softmax(logits, safe)
        values = _collect(softmax, logits, counted, safe, squares)
        # Tokens do not depend on each other, so one product gives the gradient of each by its own hidden state.
        if not on_cpu():
            return values.logp.sum(), values
        # Its gradient is the vector-Jacobian product with by_logits, of the one softmax; its value is never computed.
        is_target = (mx.arange(logits.shape[-1]) == safe[:, None]).astype(mx.float32)
        by_logits = mx.stop_gradient((is_target - softmax.p) * counted[:, None].astype(mx.float32))
        return (logits.astype(mx.float32) * by_logits).sum(), values

    (_, values), slope = mx.value_and_grad(surrogate)(hidden)
    return values, slope


def _split_targets(targets: mx.array) -> tuple[mx.array, mx.array]:
    """Which targets count, and an id for each."""
    counted = targets != IGNORED
    return counted, mx.where(counted, targets, 0)


class _Softmax(NamedTuple):
    """Of the ids (N,) the log-probability; the log of the sum of exponentials (N, 1); of all logits (N, V) the
    log-probabilities and probabilities. float32; gradients flow through the first alone.
    """

    logp: mx.array
    normaliser: mx.array
    logps: mx.array
    p: mx.array


def _softmax(logits: mx.array, safe: mx.array) -> _Softmax:
    if not on_cpu():
        # One kernel, and one for the gradient, which reads the logits in their own dtype.
        logp = -mx.fast.cross_entropy(logits, safe)
        own = mx.take_along_axis(logits, safe[:, None], axis=-1).astype(mx.float32)
        normaliser = mx.stop_gradient(own - logp[:, None])
        logps = mx.stop_gradient(logits).astype(mx.float32) - normaliser
        return _Softmax(logp, normaliser, logps, exponential(logps))
    wide = logits.astype(mx.float32)
    # All below the largest: nothing then is a small difference of large numbers.
    top = mx.stop_gradient(wide.max(axis=-1, keepdims=True))
    below = wide - top
    exponentials = exponential(below)
    total = blocked_sum(exponentials)[:, None]
    log_total = mx.log(total)
    logp = (mx.take_along_axis(below, safe[:, None], axis=-1) - log_total).squeeze(-1)
    fixed = (log_total + top, below - log_total, exponentials * (1 / total))
    return _Softmax(logp, *map(mx.stop_gradient, fixed))


def _collect(softmax: _Softmax, logits: mx.array, counted: mx.array, safe: mx.array, squares: bool) -> TokenLogps:
    logits = mx.stop_gradient(logits)
    entropy, total, square_sum = _sums(softmax, logits, squares)
    values = (
        softmax.logp,
        entropy,
        total / logits.shape[-1],
        (mx.argmax(logits, axis=-1) == safe).astype(mx.float32),
        mx.zeros_like(total) if square_sum is None else mx.log(square_sum),
    )
    return TokenLogps(*(mx.where(counted, value, 0.0) for value in values))


def _sums(softmax: _Softmax, logits: mx.array, squares: bool) -> tuple[mx.array, mx.array, mx.array | None]:
    """Over the vocabulary, each (N,): of ``-p * logps``, of ``logits`` and, where asked for, of squared ``p``."""
    if on_cpu():
        square_sum = blocked_sum(mx.square(softmax.p)) if squares else None
        return -blocked_sum(softmax.p * softmax.logps), blocked_sum(logits.astype(mx.float32)), square_sum
    # As in :func:`~hf_mlx.training.loss.sums_and_gradient`: each sum reads the logits themselves, one after the other.
    logps = lambda x: x.astype(mx.float32) - softmax.normaliser  # noqa: E731
    entropy = -sum_in_pieces(lambda x: exponential(logps(x)) * logps(x), logits)
    again = mx.depends([logits], [entropy])[0]
    total = sum_in_pieces(lambda x: x.astype(mx.float32), again)
    if not squares:
        return entropy, total, None
    again = mx.depends([logits], [total])[0]
    return entropy, total, sum_in_pieces(lambda x: exponential(2 * logps(x)), again)


def _join(parts: Sequence[TokenLogps]) -> TokenLogps:
    return (
        parts[0] if len(parts) == 1 else TokenLogps(*(mx.concatenate(list(each)) for each in zip(*parts, strict=True)))
    )
