"""Losses and metrics of logits as trained models have them, beside float64: nothing cancels, long sums stay exact."""

import mlx.core as mx
import numpy as np
import pytest

from hf_mlx.settings.plan import LossPlan
from hf_mlx.training.linear_logps import token_logps
from hf_mlx.training.loss import IGNORED, sums_and_gradient, token_sums
from hf_mlx.training.pair_rows import sum_by_answer

# Two roundings of float32 to 24 bits.
CLOSE = 2.5e-7


def logits_of(spread: float, level: float, tokens: int = 600, vocabulary: int = 4096) -> tuple[np.ndarray, np.ndarray]:
    """Random logits, and targets that mostly are the likeliest token."""
    draw = np.random.default_rng(int(spread + abs(level)))
    logits = (draw.normal(size=(tokens, vocabulary)) * spread + level).astype(np.float32)
    targets = np.where(draw.random(tokens) < 0.7, logits.argmax(1), draw.integers(0, vocabulary, tokens))
    targets[::9] = IGNORED
    return logits, targets.astype(np.int32)


def exact(logits: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of the targets that count, and the entropies there, float64."""
    below = logits.astype(np.float64) - logits.max(1, keepdims=True)
    logps = below - np.log(np.exp(below).sum(1, keepdims=True))
    counted = targets != IGNORED
    return logps[counted, targets[counted]], -(np.exp(logps) * logps).sum(1)[counted]


@pytest.mark.parametrize("spread, level", [(1, 0), (5, 20), (8, 20), (3, -30)])
def test_loss_and_entropy_are_float64s_to_rounding(spread, level):
    logits, targets = logits_of(spread, level)
    logps, entropies = exact(logits, targets)
    for found in (
        token_sums(mx.array(logits), mx.array(targets), LossPlan()),
        sums_and_gradient(mx.array(logits), mx.array(targets), LossPlan())[0],
    ):
        assert found.loss.item() == pytest.approx(-logps.sum(), rel=CLOSE)
        assert found.entropy.item() == pytest.approx(entropies.sum(), rel=CLOSE)


@pytest.mark.parametrize("spread, level", [(1, 0), (8, 20)])
def test_single_tokens_are_float64s_to_rounding(spread, level):
    logits, targets = logits_of(spread, level)
    logps, entropies = exact(logits, targets)
    found = token_logps(mx.array(logits), mx.array(targets))
    counted = targets != IGNORED
    # Near 0 the rounding of the sum of 4096 exponentials is left, whose logarithm is taken.
    np.testing.assert_allclose(np.array(found.logp)[counted], logps, rtol=CLOSE, atol=2 * CLOSE)
    np.testing.assert_allclose(np.array(found.entropy)[counted], entropies, rtol=2 * CLOSE, atol=2 * CLOSE)


def test_a_row_of_thousands_of_tokens_adds_up():
    draw = np.random.default_rng(5)
    values = (-14 * draw.random(2 * 8192)).astype(np.float32)
    arrays = {"input_ids": mx.zeros((2, 8192)), "targets": mx.zeros(2 * 8192), "answers": mx.array([0, 1])}
    found = np.array(sum_by_answer(mx.array(values), arrays))
    np.testing.assert_allclose(found, values.astype(np.float64).reshape(2, -1).sum(1), rtol=CLOSE)
