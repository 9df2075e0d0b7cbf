"""Linear recurrences over tokens in chunks: the gated delta rule and Mamba-2's state space, with their gradients.

A state S, (Dk, Dv) for each head, goes from token to token:

    S_t = diag(e^{g_t}) S_{t-1} + k_t (β_t (v_t - k_tᵀ diag(e^{g_t}) S_{t-1}))    (gated delta rule)
    S_t = diag(e^{g_t}) S_{t-1} + k_t v_t                                       (without β: Mamba-2)
    o_t = q_tᵀ S_t

Within a chunk the delta rule's corrections solve a unit triangular system (the WY representation), so a chunk is a
handful of matrix products, and the states at its ends obey S' = M S + K. Only these states are kept for the backward
pass, which runs the same affine recurrence from the end.

Sources: Yang et al., "Parallelizing Linear Transformers with the Delta Rule over Sequence Length" (2024); Yang, Kautz,
Hatamizadeh, "Gated Delta Networks" (2024); Kimi Team, "Kimi Linear" (2025), the decay for each channel; Dao, Gu,
"Transformers are SSMs" (2024). Compared with transformers 5.23 ``torch_chunk_gated_delta_rule``.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx

from .triangular import identity, join_blocks, lower, unit_lower_inverse

# Tokens of a chunk: products are large enough for a GPU, and a chunk's squares stay smaller than its keys.
CHUNK = 64
# Blocks of this size are computed pair by pair where each channel decays for itself.
_PAIRS = 4


def linear_recurrence(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    log_decay: mx.array,
    beta: mx.array | None = None,
    *,
    chunk: int = CHUNK,
) -> mx.array:
    """The outputs o of the recurrence, from a state of zeros. Computed in float32.

    Args:
        queries: (B, T, G, Dk), scaled. Each of the G heads serves H // G consecutive value heads.
        keys: (B, T, G, Dk).
        values: (B, T, H, Dv).
        log_decay: g ≤ 0, (B, T, H), or (B, T, H, Dk) where each channel decays for itself.
        beta: (B, T, H) for the delta rule, None for plain addition.
        chunk: A power of two.

    Returns:
        (B, T, H, Dv), of the values' dtype.
    """
    tokens, heads = values.shape[1:3]
    while chunk >= 2 * tokens and chunk > _PAIRS:
        chunk //= 2
    layout = _Layout(keys.shape[2], chunk)
    if log_decay.ndim == 3:
        log_decay = log_decay[..., None]
    parts = [layout.split(x) for x in (queries, keys, values, log_decay)]
    if beta is not None:
        parts.append(layout.split(beta[..., None]))
    outputs, _ = _recurrence()(*parts)
    return layout.join(outputs, heads)[:, :tokens].astype(values.dtype)


class _Layout(NamedTuple):
    """(B, T, heads, D) ↔ (chunks, B, groups, heads of a group, tokens of a chunk, D)."""

    groups: int
    chunk: int

    def split(self, x: mx.array) -> mx.array:
        batch, tokens, heads, width = x.shape
        x = mx.pad(x.astype(mx.float32), [(0, 0), (0, -tokens % self.chunk), (0, 0), (0, 0)])
        x = x.reshape(batch, -1, self.chunk, self.groups, heads // self.groups, width)
        return x.transpose(1, 0, 3, 4, 2, 5)

    def join(self, x: mx.array, heads: int) -> mx.array:
        return x.transpose(1, 0, 4, 2, 3, 5).reshape(x.shape[1], -1, heads, x.shape[-1])


class _Chunks(NamedTuple):
    """What the chunks are, whatever state S they begin with: o = Q S + P N, S' = decay S + Kᵀ N.

    N is V, or for the delta rule the solution of (I + L) N = β (V - B S).
    """

    scores: mx.array  # P
    queries: mx.array  # Q
    keys: mx.array  # K
    values: mx.array  # V
    decay: mx.array
    delta: tuple[mx.array, mx.array, mx.array] | None = None  # L, B, β

    def corrections(self) -> tuple[mx.array, mx.array]:
        """What V - B S is multiplied with, (I + L)⁻¹ β, and what that takes from N for each S."""
        assert self.delta is not None
        overlaps, reads, beta = self.delta
        corrections = unit_lower_inverse(overlaps) * _transposed(beta)
        return corrections, corrections @ reads


def _prepare(q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array | None = None) -> _Chunks:
    grown = mx.exp(mx.cumsum(g, axis=-2))
    shrunk = mx.exp(mx.cumsum(g, axis=-2, reverse=True, inclusive=False))
    decay = _transposed(grown[..., -1:, :])
    if beta is None:
        (scores,) = _decayed_products([q], k, g)
        return _Chunks(scores, q * grown, k * shrunk, v, decay)
    scores, overlaps = _decayed_products([q, k], k, g)
    delta = overlaps * beta * lower(overlaps.shape[-1], -1), k * grown, beta
    return _Chunks(scores, q * grown, k * shrunk, v, decay, delta)


def _apply(chunks: _Chunks, states: mx.array) -> mx.array:
    """Outputs of chunks that begin with ``states``."""
    news = chunks.values
    if chunks.delta is not None:
        corrections, taken = chunks.corrections()
        news = corrections @ news - taken @ states
    return chunks.queries @ states + chunks.scores @ news


def _apply_back(chunks: _Chunks, states: mx.array, d_outputs: mx.array, d_ends: mx.array) -> list[mx.array]:
    """The gradients of what the chunks are, in its order, given those of the outputs and of the states at the ends."""
    news = chunks.values
    d_news = d_values = _transposed(chunks.scores) @ d_outputs + chunks.keys @ d_ends
    d_delta = []
    if chunks.delta is not None:
        overlaps, reads, beta = chunks.delta
        inverse, rest = unit_lower_inverse(overlaps), news - reads @ states
        news = inverse @ (beta * rest)
        d_solved = _transposed(inverse) @ d_news
        d_values = beta * d_solved
        # The right side is (I + L) N, so L's gradient is what N and the right side's gradient make of it.
        d_overlaps = -d_solved @ _transposed(news)
        d_delta = [d_overlaps, -d_values @ _transposed(states), (d_solved * rest).sum(axis=-1, keepdims=True)]
    d_decay = (d_ends * states).sum(axis=-1, keepdims=True)
    if chunks.decay.shape[-2] == 1:
        d_decay = d_decay.sum(axis=-2, keepdims=True)
    d_scores, d_queries = (d_outputs @ _transposed(x) for x in (news, states))
    return [d_scores, d_queries, news @ _transposed(d_ends), d_values, d_decay, *d_delta]


def _scan(chunks: _Chunks) -> mx.array:
    """The states that the chunks begin with."""
    keys = _transposed(chunks.keys)
    if chunks.delta is None:
        return _pass_on(chunks.decay, keys @ chunks.values)
    corrections, taken = chunks.corrections()
    return _pass_on(_moves(chunks, taken), keys @ (corrections @ chunks.values))


def _scan_back(chunks: _Chunks, d_outputs: mx.array) -> mx.array:
    """The gradients of the states that the chunks end with."""
    added = _transposed(chunks.queries) @ d_outputs
    if chunks.delta is None:
        return _pass_on(chunks.decay, added, back=True)
    _, taken = chunks.corrections()
    added = added - _transposed(taken) @ (_transposed(chunks.scores) @ d_outputs)
    return _pass_on(_transposed(_moves(chunks, taken)), added, back=True)


def _moves(chunks: _Chunks, taken: mx.array) -> mx.array:
    """M of S' = M S + A: (…, Dk, Dk)."""
    return chunks.decay * identity(taken.shape[-1]) - _transposed(chunks.keys) @ taken


def _pass_on(moves: mx.array, added: mx.array, *, back: bool = False) -> mx.array:
    """The S_n of S_{n+1} = M_n S_n + A_n from zero on; from the last chunk to the first where ``back``.

    Where moves are no matrices they are what each row of a state is multiplied by.
    """
    steps = [(moves[n : n + 1], added[n : n + 1]) for n in range(added.shape[0])]
    states = [mx.zeros_like(steps[0][1])]
    for move, more in steps[:0:-1] if back else steps[:-1]:
        states.append(move * states[-1] + more if move.shape[-1] == 1 else mx.addmm(more, move, states[-1]))
    return mx.concatenate(states[::-1] if back else states)


def _transposed(x: mx.array) -> mx.array:
    return x.swapaxes(-1, -2)


def _flat(*parts: mx.array) -> list[mx.array]:
    *whole, delta = _prepare(*parts)
    return [*whole, *(delta or ())]


@cache
def _recurrence() -> Any:
    """Outputs, and the states that the backward pass starts from."""

    @mx.custom_function
    def recurrence(*parts: mx.array) -> tuple[mx.array, mx.array]:
        chunks = _prepare(*parts)
        states = _scan(chunks)
        return _apply(chunks, states), states

    @recurrence.vjp
    def gradient(parts: Any, cotangents: Any, outputs: Any) -> Any:
        chunks = _prepare(*parts)
        # Given the gradients of their ends, chunks no longer depend on each other.
        by_chunks = _apply_back(chunks, outputs[1], cotangents[0], _scan_back(chunks, cotangents[0]))
        return mx.vjp(_flat, list(parts), by_chunks)[1]

    return recurrence


def _decayed_products(left: list[mx.array], right: mx.array, g: mx.array) -> list[mx.array]:
    """For each a of ``left`` the lower triangle of Σ_d a_i b_j e^{g_{j+1} + … + g_i}."""
    if g.shape[-1] == 1:
        decay = _decay_between(g)
        return [(a @ right.swapaxes(-1, -2)) * decay for a in left]
    return list(_decayed_by_channel(mx.stack(left), right, g))


def _decay_between(g: mx.array) -> mx.array:
    """e^{g_{j+1} + … + g_i} for j ≤ i, else 0: (…, C, C) of (…, C, 1).

    Each sum is one of its own tokens: a difference of two long ones loses their digits.
    """
    size = g.shape[-2]
    return mx.exp(mx.cumsum(g * lower(size, -1), axis=-2)) * lower(size)


def _decayed_by_channel(left: mx.array, right: mx.array, g: mx.array) -> mx.array:
    """The products, in the same halves; ``left`` has one axis more than the others, its first."""
    if g.shape[-2] <= _PAIRS:
        return (left[..., :, None, :] * right[..., None, :, :] * _pairwise_decay(g)).sum(-1)
    halves = [_halves(x) for x in (left, right, g)]
    stacked = (mx.stack(list(pair), axis=axis) for pair, axis in zip(halves, (1, 0, 0), strict=True))
    upper, lower = _decayed_by_channel(*stacked).swapaxes(0, 1)
    later, earlier = halves[0][1] * _from_middle(halves[2][1]), halves[1][0] * _to_middle(halves[2][0])
    return join_blocks(upper, later @ earlier.swapaxes(-1, -2), lower)


def _halves(x: mx.array) -> tuple[mx.array, mx.array]:
    half = x.shape[-2] // 2
    return x[..., :half, :], x[..., half:, :]


def _from_middle(after: mx.array) -> mx.array:
    return mx.exp(mx.cumsum(after, axis=-2))


def _to_middle(before: mx.array) -> mx.array:
    return mx.exp(mx.cumsum(before, axis=-2, reverse=True, inclusive=False))


def _pairwise_decay(g: mx.array) -> mx.array:
    """The same of a few tokens, pair by pair: (…, C, C, D)."""
    size, total = g.shape[-2], mx.cumsum(g, axis=-2)
    return mx.exp(mx.where(lower(size)[..., None] > 0, total[..., :, None, :] - total[..., None, :, :], -mx.inf))
