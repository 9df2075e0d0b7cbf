"""Mamba's selective scan in segments, with its gradient: states are kept at the segments' ends only.

    h_t = e^{Δ_t A} h_{t-1} + Δ_t x_t B_t,    y_t = C_tᵀ h_t

Every channel and state entry decays for itself, so there is no form in matrix products. A segment is scanned in two
levels: all its chunks side by side from zero, then the chunks' ends one after the other, then all chunks again from
their right beginnings. The backward pass recomputes one segment at a time.

Sources: Gu, Dao, "Mamba" (2023), equation 2; Blelloch, "Prefix Sums and Their Applications" (1990). Compared with
transformers 5.23 ``MambaMixer.slow_forward``.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx

# Tokens of a chunk, and of a segment: as many chunks as a chunk has tokens, so both levels take as many steps.
CHUNK = 16
SEGMENT = CHUNK * CHUNK


def selective_scan(x: mx.array, delta: mx.array, a: mx.array, b: mx.array, c: mx.array) -> mx.array:
    """y of the scan from a state of zeros. Computed in float32.

    Args:
        x: (B, T, D).
        delta: Δ ≥ 0, (B, T, D).
        a: A < 0, (D, S).
        b: (B, T, S).
        c: (B, T, S).

    Returns:
        (B, T, D), of x's dtype.
    """
    tokens = x.shape[1]
    padding = -tokens % (CHUNK if tokens < SEGMENT else SEGMENT)
    parts = [mx.pad(part.astype(mx.float32), [(0, 0), (0, padding), (0, 0)]) for part in (x, delta, b, c)]
    outputs, _ = _scan()(a.astype(mx.float32), *parts)
    return outputs[:, :tokens].astype(x.dtype)


@cache
def _scan() -> Any:
    """Outputs, and the states that segments begin with."""

    @mx.custom_function
    def scan(a: mx.array, *parts: mx.array) -> tuple[mx.array, mx.array]:
        states, outputs = [mx.zeros((parts[0].shape[0], *a.shape))], []
        for segment in _segments(parts):
            output, state = _segment(a, *segment, states[-1])  # pyright: ignore[reportCallIssue]
            outputs.append(output)
            states.append(state)
        return mx.concatenate(outputs, axis=1), mx.stack(states[:-1])

    @scan.vjp
    def gradient(primals: Any, cotangents: Any, outputs: Any) -> Any:
        a, *parts = primals
        d_a, d_state, d_parts = mx.zeros_like(a), mx.zeros_like(outputs[1][0]), []
        segments = zip(_segments((*parts, cotangents[0])), outputs[1], strict=True)
        for (*segment, d_output), state in reversed(list(segments)):
            _, grads = mx.vjp(_segment, [a, *segment, state], [d_output, d_state])
            d_a, d_state = d_a + grads[0], grads[-1]
            d_parts.append(grads[1:-1])
        joined = [mx.concatenate(list(pieces), axis=1) for pieces in zip(*reversed(d_parts), strict=True)]
        return d_a, *joined

    return scan


def _segments(parts: tuple[mx.array, ...]) -> list[list[mx.array]]:
    return [[part[:, i : i + SEGMENT] for part in parts] for i in range(0, parts[0].shape[1], SEGMENT)]


def _segment(
    a: mx.array, x: mx.array, delta: mx.array, b: mx.array, c: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """Outputs (B, n, D) and the last state (B, D, S) of a segment that begins with ``state``."""
    batch, tokens, channels = x.shape
    x, delta, b, c = (part.reshape(batch, -1, CHUNK, part.shape[-1]) for part in (x, delta, b, c))
    scaled = delta * x
    decays = [mx.exp(delta[:, :, t, :, None] * a) for t in range(CHUNK)]
    added = [scaled[:, :, t, :, None] * b[:, :, t, None, :] for t in range(CHUNK)]
    ends = added[0]
    for t in range(1, CHUNK):
        ends = decays[t] * ends + added[t]
    passed = mx.exp(delta.sum(axis=2)[..., None] * a)
    begins = [state]
    for n in range(x.shape[1]):
        begins.append(passed[:, n] * begins[n] + ends[:, n])
    states, outputs = mx.stack(begins[:-1], axis=1), []
    for t in range(CHUNK):
        states = decays[t] * states + added[t]
        outputs.append((states @ c[:, :, t, :, None])[..., 0])
    return mx.stack(outputs, axis=2).reshape(batch, tokens, channels), begins[-1]
