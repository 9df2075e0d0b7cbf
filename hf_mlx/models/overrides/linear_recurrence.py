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

from .triangular import join_blocks, unit_lower_inverse

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
    """What the chunks are, whatever state they begin with: o = Q S + P (U - W S), S' = decay S + Kᵀ (U - W S)."""

    scores: mx.array  # P
    queries: mx.array  # Q
    keys: mx.array  # K
    decay: mx.array
    updates: mx.array  # U
    reads: mx.array | None  # W, of the delta rule


def _prepare(q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array | None = None) -> _Chunks:
    grown = mx.exp(mx.cumsum(g, axis=-2))
    shrunk = mx.exp(mx.cumsum(g, axis=-2, reverse=True, inclusive=False))
    decay = grown[..., -1:, :].swapaxes(-1, -2)
    if beta is None:
        (scores,) = _decayed_products([q], k, g)
        return _Chunks(scores, q * grown, k * shrunk, decay, v, None)
    scores, overlaps = _decayed_products([q, k], k, g)
    solved = unit_lower_inverse(mx.tril(overlaps * beta, -1))
    return _Chunks(scores, q * grown, k * shrunk, decay, solved @ (v * beta), solved @ (k * (grown * beta)))


def _apply(chunks: _Chunks, states: mx.array) -> tuple[mx.array, mx.array]:
    """Outputs and next states of chunks that begin with ``states``."""
    news = chunks.updates if chunks.reads is None else chunks.updates - chunks.reads @ states
    outputs = chunks.queries @ states + chunks.scores @ news
    return outputs, chunks.decay * states + chunks.keys.swapaxes(-1, -2) @ news


def _scan(chunks: _Chunks) -> mx.array:
    """The states that the chunks begin with."""
    added = chunks.keys.swapaxes(-1, -2) @ chunks.updates
    moves = None if chunks.reads is None else _moves(chunks, chunks.reads)
    states = [mx.zeros_like(added[0])]
    for n in range(added.shape[0] - 1):
        passed = chunks.decay[n] * states[n] if moves is None else moves[n] @ states[n]
        states.append(passed + added[n])
    return mx.stack(states)


def _scan_back(chunks: _Chunks, d_outputs: mx.array) -> mx.array:
    """The gradients of the states that the chunks end with."""
    added = chunks.queries.swapaxes(-1, -2) @ d_outputs
    moves = None
    if chunks.reads is not None:
        added = added - chunks.reads.swapaxes(-1, -2) @ (chunks.scores.swapaxes(-1, -2) @ d_outputs)
        moves = _moves(chunks, chunks.reads).swapaxes(-1, -2)
    gradient = mx.zeros_like(added[0])
    gradients = [gradient]
    for n in reversed(range(1, added.shape[0])):
        passed = chunks.decay[n] * gradient if moves is None else moves[n] @ gradient
        gradients.append(gradient := passed + added[n])
    return mx.stack(gradients[::-1])


def _moves(chunks: _Chunks, reads: mx.array) -> mx.array:
    """M of S' = M S + K: (…, Dk, Dk)."""
    return chunks.decay * mx.eye(chunks.keys.shape[-1]) - chunks.keys.swapaxes(-1, -2) @ reads


@cache
def _recurrence() -> Any:
    """Outputs, and the states that the backward pass starts from."""

    @mx.custom_function
    def recurrence(*parts: mx.array) -> tuple[mx.array, mx.array]:
        chunks = _prepare(*parts)
        states = _scan(chunks)
        return _apply(chunks, states)[0], states

    @recurrence.vjp
    def gradient(parts: Any, cotangents: Any, outputs: Any) -> Any:
        states = outputs[1]
        ends = _scan_back(_prepare(*parts), cotangents[0])
        # Given the gradients of their ends, chunks no longer depend on each other.
        return mx.vjp(lambda *parts: _apply(_prepare(*parts), states), list(parts), [cotangents[0], ends])[1]

    return recurrence


def _decayed_products(left: list[mx.array], right: mx.array, g: mx.array) -> list[mx.array]:
    """For each a of ``left`` the lower triangle of Σ_d a_i b_j e^{g_{j+1} + … + g_i}."""
    if g.shape[-1] == 1:
        decay = _decay_between(g)
        return [(a @ right.swapaxes(-1, -2)) * decay for a in left]
    return list(_decayed_by_channel(mx.stack(left), right, g))


def _decay_between(g: mx.array) -> mx.array:
    """e^{g_{j+1} + … + g_i} for j ≤ i, else 0: (…, C, C) of (…, C, 1).

    By halves: the decay up to the middle and the one from it on are factors, neither of which can overflow, and no
    difference of long sums loses their digits.
    """
    if g.shape[-2] <= _PAIRS:
        return _pairwise_decay(g)[..., 0]
    before, after = _halves(g)
    upper, lower = _decay_between(mx.stack([before, after]))
    return join_blocks(upper, _from_middle(after) * _to_middle(before).swapaxes(-1, -2), lower)


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
    causal = mx.tril(mx.ones((size, size), dtype=mx.bool_))[..., None]
    return mx.exp(mx.where(causal, total[..., :, None, :] - total[..., None, :, :], -mx.inf))
