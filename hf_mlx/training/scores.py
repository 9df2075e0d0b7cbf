"""The objective of a reward model: the chosen row of each pair is to score above the rejected one."""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..adapters.draws import row_keys
from ..adapters.dropout import KeyedDropout
from ..data.batch import Batch
from ..models.heads import Head
from ..models.load import LoadedModel
from ..models.masks import row_cache
from ..models.scoring import score_rows
from ..settings.plan import ScoreLossPlan
from .blocked_attention import written_windows
from .inputs import Inputs
from .objective import Slots
from .optimizers.contract import Arrays
from .router import Routers

SCORE_METRICS = ("min_reward", "mean_reward", "max_reward", "accuracy", "margin")
#: Those that do not add up over processes, and with which sign they are the largest of all.
EXTREMES = {"min_reward": -1.0, "max_reward": 1.0}


class ScoreObjective:
    """The loss of trl 1.16 ``RewardTrainer``: a mean over the pairs of the micro-batch.

    ``-logsigmoid(chosen - rejected - margin)``, and ``center_rewards_coefficient`` times the square of the sum of both
    (Eq. 2 of https://huggingface.co/papers/2312.09244).

    Args:
        loaded: The model, with adapters already attached.
        names: Flat MLX names of what is trained.
        plan: Which loss.
    """

    captured: Arrays | None = None
    routers: Routers | None = None
    head: Head | None = None
    aux_coefficient: float = 0.0
    metrics: tuple[str, ...] = SCORE_METRICS
    # The smallest and the largest reward of a micro-batch are logged.
    whole: bool = True

    def __init__(self, loaded: LoadedModel, names: Iterable[str], plan: ScoreLossPlan) -> None:
        self.model = loaded.model
        self.plan = plan
        self.slots = Slots(loaded.model, names)
        self._written = written_windows(loaded)
        self._dropouts = [module for module in loaded.model.modules() if isinstance(module, KeyedDropout)]

    def __call__(self, params: Arrays, arrays: Arrays) -> tuple[mx.array, Arrays]:
        """The loss and the metrics of a micro-batch.

        Args:
            params: Flat {MLX name: array}.
            arrays: ``input_ids`` (2P, W) and ``last`` (2P,) int32, all chosen rows first, maybe ``margins`` (P,)
                float32; in training also ``key``, what dropout draws from.
        """
        self.slots.bind(params)
        if self.model.training:
            self._bind_keys(arrays)
        rewards = self._score(arrays)
        chosen, rejected = rewards.reshape(2, -1)
        ahead = chosen - rejected
        loss = -nn.log_sigmoid(ahead - arrays["margins"] if "margins" in arrays else ahead).mean()
        if self.plan.center_rewards_coefficient is not None:
            loss = loss + self.plan.center_rewards_coefficient * mx.square(chosen + rejected).mean()
        measured = {
            "min_reward": rewards.min(),
            "mean_reward": rewards.mean(),
            "max_reward": rewards.max(),
            "accuracy": (chosen > rejected).astype(mx.float32).mean(),
            "margin": ahead.mean(),
        }
        return loss, {name: mx.stop_gradient(value) for name, value in measured.items()}

    def logits(self, arrays: Arrays) -> mx.array:
        """The rewards (2P, 1), which are what upstream's model has for logits."""
        return self._score(arrays)[:, None]

    def rows_together(self, arrays: Arrays) -> int:
        """All: a micro-batch is not cut."""
        return arrays["input_ids"].shape[0]

    def divisor(self, inputs: Inputs) -> int:
        """1: what :meth:`__call__` returns is divided already."""
        return 1

    def predictions(self, logits: np.ndarray, batch: Batch) -> tuple[np.ndarray, tuple[()]]:
        """The rewards, and the empty tuple that upstream has for the labels."""
        return logits, ()

    def _score(self, arrays: Arrays) -> mx.array:
        ids = arrays["input_ids"]
        return score_rows(self.model, ids, arrays["last"], row_cache(self.model, ids.shape[1], self._written))

    def _bind_keys(self, arrays: Arrays) -> None:
        if not self._dropouts:
            return
        keys = mx.random.split(arrays["key"][:2], len(self._dropouts) + 1)
        rows = arrays["key"][2] + mx.arange(arrays["input_ids"].shape[0]).astype(mx.uint32)
        for index, dropout in enumerate(self._dropouts):
            dropout.bind(row_keys(keys[index + 1], rows))
