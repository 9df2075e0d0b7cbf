"""What ``transformers.Trainer`` minimises of a causal model: its own loss, nothing else measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..models.load import LoadedModel
from ..settings.plan import LossPlan
from .inputs import Inputs
from .objective import TokenObjective
from .optimizers.contract import Arrays
from .router import Routers
from .weighting import ByTokens, Weights, count_processes, divides_together


class LanguageObjective(TokenObjective):
    """:class:`~hf_mlx.training.objective.TokenObjective` without trl's metrics; arguments as there."""

    def __init__(
        self, loaded: LoadedModel, names: Iterable[str], plan: LossPlan, routers: Routers | None = None
    ) -> None:
        super().__init__(loaded, names, plan, routers)
        self.metrics: tuple[str, ...] = () if routers is None else ("aux_loss",)
        # transformers 5.23 ``Trainer.prediction_step`` counts as in training; LabelSmoother divides by its targets.
        counted = loaded.counts_every_label and loaded.accepts_loss_kwargs
        self._counts_every_label = counted and not plan.label_smoothing_factor
        config = loaded.config.get("text_config") or loaded.config
        self.unseen = ("aux_loss", "router_logits") if config.get("output_router_logits") else ()

    def divisor(self, inputs: Inputs) -> int:
        """The scored tokens, or all that are labelled where transformers' count goes by them; at least one."""
        return max(inputs.labelled if self._counts_every_label else inputs.valid, 1)

    def __call__(self, params: Arrays, arrays: Arrays) -> tuple[mx.array, Arrays]:
        """The loss as a sum over the scored tokens, and the routers' loss where the model adds one."""
        loss, measured = super().__call__(params, arrays)
        return loss, {name: measured[name] for name in self.metrics}


@dataclass(frozen=True)
class ByTrainer(ByTokens):
    """As ``transformers.Trainer.training_step`` divides (5.23): the model's own routers' loss is not divided by the
    accumulation where the loss is by the tokens of the window."""

    def __call__(self, window: Sequence[Inputs]) -> list[Weights]:
        """The divisors of each micro-batch of ``window``."""
        divisor = 1 if self.accepts_loss_kwargs else len(window)
        if not (self.accepts_loss_kwargs and divides_together(window)):
            # What is not multiplied by their number upstream, torch's DDP averages over the processes.
            divisor *= count_processes(window)
        shares = mx.array(float(divisor))
        return [{**weights, "metrics": {}, "aux_loss": shares} for weights in super().__call__(window)]
