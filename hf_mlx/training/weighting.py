"""What each micro-batch of a window weighs in the gradient and in the log."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx

from .inputs import Counted, Inputs
from .objective import TOKEN_METRICS
from .optimizers.contract import Arrays
from .pairs import PAIR_METRICS
from .scores import EXTREMES, SCORE_METRICS

# {"loss": …, "aux_loss": …, "metrics": {name: …}}
Weights = dict[str, Any]


class Weighting(Protocol):
    """The micro-batches of a window -> for each, what its sums are divided by, as float32 scalars.

    ``loss`` and ``aux_loss`` divide what is minimised, ``metrics`` by name what is logged; a metric left out stays as
    it is, and what does not count is divided by infinity. Counts are whole numbers, so a quotient is rounded once, as
    upstream's is; a factor 1 / count would be rounded before it is used.
    """

    def __call__(self, window: Sequence[Inputs]) -> list[Weights]: ...

    def shares(self, name: str, counted: Counted, kept: int) -> list[float]:
        """By rank, what a process's mean of a metric weighs in that of all; ``kept`` as of ``Peers``."""
        ...


class ByMicroBatch:
    """Each micro-batch of a window weighs the same, however many rows it has (trl 1.16 ``DPOTrainer``).

    What the objective returns is a mean over the micro-batch already.
    """

    metrics = PAIR_METRICS

    def __call__(self, window: Sequence[Inputs]) -> list[Weights]:
        """The divisors of each micro-batch of ``window``."""
        shares = mx.array(float(len(window) * count_processes(window)))
        return [{"loss": shares, "metrics": self._metrics(micro), "aux_loss": shares} for micro in window]

    def shares(self, name: str, counted: Counted, kept: int) -> list[float]:
        """Tokens weigh the means over tokens, pairs those over pairs; the latter are gathered whole."""
        rejected = [all_of - chosen for all_of, chosen in zip(counted.valid, counted.chosen, strict=True)]
        over = {
            "aux_loss": [1] * len(counted.valid),
            "entropy": counted.valid,
            "logits/chosen": counted.chosen,
            "mean_token_accuracy": counted.chosen,
            "logits/rejected": rejected,
        }
        return _shares(over[name], kept) if name in over else _shares(counted.pairs, len(counted.pairs))

    def _metrics(self, micro: Inputs) -> Arrays:
        peers = micro.peers
        if peers is None:
            return {}
        names = (*self.metrics, "aux_loss")
        weights = {name: self.shares(name, peers.counted, peers.kept)[peers.rank] for name in names}
        return {name: mx.array(1 / weight if weight else math.inf) for name, weight in weights.items()}


class ByScore(ByMicroBatch):
    """The same of scored pairs (trl 1.16 ``RewardTrainer``).

    The least and the greatest reward are those of all processes before they are weighed.
    """

    metrics = SCORE_METRICS

    def shares(self, name: str, counted: Counted, kept: int) -> list[float]:
        """Rewards are gathered whole, means over pairs by process."""
        if name == "mean_reward":
            return _shares(counted.pairs, len(counted.pairs))
        return _shares([1] * len(counted.pairs), len(counted.pairs) if name in EXTREMES else kept)


@dataclass(frozen=True)
class ByTokens:
    """Sums over tokens become the means that transformers and TRL take.

    Attributes:
        accepts_loss_kwargs: True normalises by the tokens of the whole window; False (some HF classes) takes
            each micro-batch's own mean, divided by the number of micro-batches.
        counts_every_label: Those tokens are all that are labelled, not the targets alone.
    """

    accepts_loss_kwargs: bool = True
    counts_every_label: bool = False

    def __call__(self, window: Sequence[Inputs]) -> list[Weights]:
        """The divisors of each micro-batch of ``window``."""
        items = max(self.count(window), 1)
        if not divides_together(window):
            items *= count_processes(window)
        shares = len(window) * count_processes(window)
        return [
            {
                "loss": mx.array(float(items if self.accepts_loss_kwargs else max(micro.valid, 1) * shares)),
                "metrics": _metric_divisors(micro),
                "aux_loss": mx.array(float(shares)),
            }
            for micro in window
        ]

    def count(self, window: Sequence[Inputs]) -> int:
        """Tokens of the window that its loss is divided by; 0 where none is trained.

        Of several processes those of all, unless ``average_tokens_across_devices`` is off.
        """
        return sum(self._count(micro) for micro in window)

    def _count(self, micro: Inputs) -> int:
        if micro.peers is None or not micro.peers.average:
            return micro.labelled if self.counts_every_label else micro.valid
        return sum(micro.peers.labelled if self.counts_every_label else micro.peers.valid)

    def shares(self, name: str, counted: Counted, kept: int) -> list[float]:
        """Tokens weigh the means over tokens; what else there is weighs the same for each process."""
        return _shares(counted.valid if name in TOKEN_METRICS else [1] * len(counted.valid), kept)


def count_processes(window: Sequence[Inputs]) -> int:
    """How many processes compute a window each: gradients and metrics are added up over them."""
    return 1 if window[0].peers is None else window[0].peers.size


def divides_together(window: Sequence[Inputs]) -> bool:
    """Whether all processes divide by the same tokens, rather than each by its own."""
    return window[0].peers is None or window[0].peers.average


def _metric_divisors(micro: Inputs) -> Arrays:
    # The objective's are sums over the micro-batch's tokens.
    peers = micro.peers
    if peers is None:
        return dict.fromkeys(TOKEN_METRICS, mx.array(float(max(micro.valid, 1))))
    if peers.rank >= peers.kept:
        return dict.fromkeys((*TOKEN_METRICS, "aux_loss"), mx.array(math.inf))
    tokens = max(sum(peers.valid[: peers.kept]), 1)
    return dict.fromkeys(TOKEN_METRICS, mx.array(float(tokens))) | {"aux_loss": mx.array(float(peers.kept))}


def _shares(sizes: Sequence[int], kept: int) -> list[float]:
    total = max(sum(sizes[:kept]), 1)
    return [size * (rank < kept) / total for rank, size in enumerate(sizes)]
