"""The losses of preference training, as pure functions of log-probabilities (trl 1.16 ``DPOTrainer._compute_loss``).

Every function takes :class:`Pairs` and a :class:`~hf_mlx.settings.plan.PairLossPlan` and returns the loss of each pair,
(P,) float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property

import mlx.core as mx
import mlx.nn as nn

from ..settings.plan import PairLossPlan

# torch's exp of float32 stays finite up to 88; trl cuts at this.
_LARGEST_EXPONENT = 80.0


class Pairs:
    """The pairs of a micro-batch.

    Args:
        logps: (P, 2) float32, the policy's summed log-probability of the chosen and of the rejected answer.
        reference: (P, 2) float32, the same of the reference; carries no gradient.
        lengths: (P, 2) float32, tokens of each answer, its first one included even where nothing predicts it.
        sft: (P,) float32, what each pair adds to the negative log-likelihood of the micro-batch's chosen tokens, such
            that the mean over pairs is the mean over tokens.
        plan: Which losses.
    """

    def __init__(
        self, logps: mx.array, reference: mx.array, lengths: mx.array, sft: mx.array, plan: PairLossPlan
    ) -> None:
        self.logps, self.reference, self.sft, self.plan = logps, reference, sft, plan
        self.lengths = mx.maximum(lengths, 1.0)

    @cached_property
    def ratios(self) -> mx.array:
        """(P, 2): log of policy over reference."""
        return self.logps - self.reference

    @cached_property
    def scores(self) -> mx.array:
        """(P, 2): the ratios under the divergence's derivative (f-DPO, https://huggingface.co/papers/2309.16240)."""
        return _DIVERGENCES[self.plan.f_divergence_type](self.ratios, self.plan)

    @cached_property
    def margin(self) -> mx.array:
        """(P,): score of the chosen answer minus that of the rejected one."""
        return self.scores[:, 0] - self.scores[:, 1]

    @cached_property
    def margin_per_token(self) -> mx.array:
        """(P,): the same with each score divided by its answer's length."""
        scaled = self.scores / self.lengths
        return scaled[:, 0] - scaled[:, 1]


def pair_loss(pairs: Pairs) -> mx.array:
    """The weighted sum of the plan's losses, (P,) float32 before WPO's weights."""
    terms = [weight * LOSSES[name](pairs, pairs.plan) for name, weight in pairs.plan.losses]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _log_sigmoid(x: mx.array) -> mx.array:
    return nn.log_sigmoid(x)


def _sigmoid(pairs: Pairs, plan: PairLossPlan) -> mx.array:
    return -_log_sigmoid(plan.beta * pairs.margin)


def _hinge(pairs: Pairs, plan: PairLossPlan) -> mx.array:
    return nn.relu(1 - plan.beta * pairs.margin)


def _ipo(pairs: Pairs, plan: PairLossPlan) -> mx.array:
    # Eq. 17 of https://huggingface.co/papers/2310.12036, per token as trl does.
    return mx.square(pairs.margin_per_token - 1 / (2 * plan.beta))


def _exo_pair(pairs: Pairs, plan: PairLossPlan) -> mx.array:
    # Eq. 16 of https://huggingface.co/papers/2402.00856 for two answers.
    logits, epsilon = plan.beta * pairs.margin, plan.label_smoothing
    won = mx.sigmoid(logits) * (_log_sigmoid(logits) - math.log1p(-epsilon))
    return won + mx.sigmoid(-logits) * (_log_sigmoid(-logits) - math.log(epsilon))


def _nca_pair(pairs: Pairs, plan: PairLossPlan) -> mx.array:
    rewards = plan.beta * pairs.ratios
    chosen, rejected = rewards[:, 0], rewards[:, 1]
    return -_log_sigmoid(chosen) - 0.5 * _log_sigmoid(-chosen) - 0.5 * _log_sigmoid(-rejected)


def _robust(pairs: Pairs, plan: PairLossPlan) -> mx.array:
    logits, noise = plan.beta * pairs.margin, plan.label_smoothing
    return (-(1 - noise) * _log_sigmoid(logits) + noise * _log_sigmoid(-logits)) / (1 - 2 * noise)


def _bco_pair(pairs: Pairs, plan: PairLossPlan) -> mx.array:
    rewards = plan.beta * pairs.ratios
    return -_log_sigmoid(rewards[:, 0]) - _log_sigmoid(-rewards[:, 1])


def _sppo_hard(pairs: Pairs, plan: PairLossPlan) -> mx.array:
    # Eq. 4.7 of https://huggingface.co/papers/2405.00675 with the winner's probability at 1.
    target = 0.5 / plan.beta
    return mx.square(pairs.ratios[:, 0] - target) + mx.square(pairs.ratios[:, 1] + target)


def _aot(pairs: Pairs, plan: PairLossPlan) -> mx.array:
    ours = mx.sort(pairs.logps[:, 0] - pairs.logps[:, 1])
    reference = mx.sort(pairs.reference[:, 0] - pairs.reference[:, 1])
    return _smoothed(ours - reference, plan)


def _aot_unpaired(pairs: Pairs, plan: PairLossPlan) -> mx.array:
    return _smoothed(mx.sort(pairs.ratios[:, 0]) - mx.sort(pairs.ratios[:, 1]), plan)


def _smoothed(delta: mx.array, plan: PairLossPlan) -> mx.array:
    logits, smoothing = plan.beta * delta, plan.label_smoothing
    return -_log_sigmoid(logits) * (1 - smoothing) - _log_sigmoid(-logits) * smoothing


def _apo_zero(pairs: Pairs, plan: PairLossPlan) -> mx.array:
    # Eq. 7 of https://huggingface.co/papers/2408.06266
    rewards = plan.beta * pairs.ratios
    return 1 - mx.sigmoid(rewards[:, 0]) + mx.sigmoid(rewards[:, 1])


def _apo_down(pairs: Pairs, plan: PairLossPlan) -> mx.array:
    # Eq. 8 of https://huggingface.co/papers/2408.06266
    chosen, rejected = pairs.ratios[:, 0], pairs.ratios[:, 1]
    return mx.sigmoid(plan.beta * chosen) + 1 - mx.sigmoid(plan.beta * (chosen - rejected))


def _discopop(pairs: Pairs, plan: PairLossPlan) -> mx.array:
    # Eq. 5 of https://huggingface.co/papers/2406.08414
    logits = plan.beta * pairs.margin
    share = mx.sigmoid(logits / plan.discopop_tau)
    return -_log_sigmoid(logits) * (1 - share) + mx.exp(-logits) * share


def _sft(pairs: Pairs, plan: PairLossPlan) -> mx.array:
    return pairs.sft


def _sigmoid_norm(pairs: Pairs, plan: PairLossPlan) -> mx.array:
    return -_log_sigmoid(plan.beta * pairs.margin_per_token)


LOSSES: Mapping[str, Callable[[Pairs, PairLossPlan], mx.array]] = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "robust": _robust,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "aot": _aot,
    "aot_unpaired": _aot_unpaired,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
    "sft": _sft,
    "sigmoid_norm": _sigmoid_norm,
}


def _reverse_kl(ratios: mx.array, plan: PairLossPlan) -> mx.array:
    return ratios


def _forward_kl(ratios: mx.array, plan: PairLossPlan) -> mx.array:
    return 1 - mx.exp(-ratios)


def _js_divergence(ratios: mx.array, plan: PairLossPlan) -> mx.array:
    return math.log(2) + _log_sigmoid(ratios)


def _alpha_divergence(ratios: mx.array, plan: PairLossPlan) -> mx.array:
    power = plan.f_alpha_divergence_coef - 1
    if abs(power) < 1e-6:  # the limit is the logarithm
        return ratios
    return (mx.exp(mx.minimum(power * ratios, _LARGEST_EXPONENT)) - 1) * (1 / power)


_DIVERGENCES: Mapping[str, Callable[[mx.array, PairLossPlan], mx.array]] = {
    "reverse_kl": _reverse_kl,
    "forward_kl": _forward_kl,
    "js_divergence": _js_divergence,
    "alpha_divergence": _alpha_divergence,
}
