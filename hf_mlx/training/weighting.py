"""What each micro-batch of a window weighs in the gradient and in the log."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

from .inputs import Inputs
from .optimizers.contract import Arrays

# The micro-batches of a window -> for each, the factors of its sums, by name, as float32 scalars.
Weighting = Callable[[Sequence[Inputs]], list[Arrays]]


def by_tokens(*, accepts_loss_kwargs: bool = True, counts_every_label: bool = False) -> Weighting:
    """Sums over tokens become the means that transformers and TRL take.

    Args:
        accepts_loss_kwargs: True normalises by the tokens of the whole window; False (some HF classes) takes
            each micro-batch's own mean, divided by the number of micro-batches.
        counts_every_label: Those tokens are all that are labelled, not the targets alone.
    """

    def weigh(window: Sequence[Inputs]) -> list[Arrays]:
        items = max(sum(micro.labelled if counts_every_label else micro.valid for micro in window), 1)

        def loss_weight(micro: Inputs) -> float:
            return 1 / items if accepts_loss_kwargs else 1 / (max(micro.valid, 1) * len(window))

        return [
            {
                "loss": mx.array(loss_weight(micro)),
                "metric": mx.array(1 / max(micro.valid, 1)),
                "aux_loss": mx.array(1 / len(window)),
            }
            for micro in window
        ]

    return weigh
