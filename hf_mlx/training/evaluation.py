"""Loss and metrics of an evaluation set, compiled, without gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import mlx.core as mx
import numpy as np

from ..data.collate import Batch
from .inputs import Counted, Inputs
from .objective import TOKEN_METRICS, Objective
from .scores import EXTREMES
from .shortage import describe_evaluation, naming_shortage
from .undefined import is_undefined
from .weighting import Weighting

# Receives logits (B, T, V) and labels (B, T) of one batch as numpy arrays, the batch and its loss; labels and loss are
# None where it has no labels, and labels are () where the loss needs none.
LogitsSink = Callable[[np.ndarray, np.ndarray | tuple[()] | None, Batch, float | None], None]


@dataclass
class EvalSums:
    """What an evaluation measured, batch by batch.

    Attributes:
        losses: Token-mean loss of each batch; of several processes those of a round one after the other.
        tokens: Scored tokens of each batch, likewise.
        chosen, pairs: Of each batch, as of :class:`~hf_mlx.training.inputs.Inputs`.
        metrics: By name, what the objective measured of each batch, or round of batches.
        batches: How many were seen; those without labels have no loss.
        rows: Of all batches.
    """

    losses: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    chosen: list[int] = field(default_factory=list)
    pairs: list[int] = field(default_factory=list)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    batches: int = 0
    rows: int = 0

    def count(self, rows: int) -> None:
        """Another batch of ``rows`` rows was seen."""
        self.batches += 1
        self.rows += rows

    @classmethod
    def gathered(
        cls, parts: Sequence[EvalSums], kept: int, *, weigh: Weighting, by_all: bool, aux_coefficient: float
    ) -> EvalSums:
        """What several processes measured, as upstream gathers it.

        Args:
            parts: By rank, as many batches each.
            kept: Of how many processes the metrics of the last round count.
            weigh: What the metrics of a process weigh in those of all.
            by_all: A batch is divided by the tokens of all processes and multiplied by their number, as transformers
                5.23 ``Trainer.prediction_step`` has it.
            aux_coefficient: What the routers' loss is multiplied by in the losses.
        """
        ranks, rounds = len(parts), min(len(part.losses) for part in parts)
        made = cls(batches=sum(part.batches for part in parts), rows=sum(part.rows for part in parts))
        for number in range(rounds):
            shares = [1.0] * ranks
            if by_all:
                tokens = max(sum(part.tokens[number] for part in parts), 1)
                shares = [part.tokens[number] * ranks / tokens for part in parts]
            for part, share in zip(parts, shares, strict=True):
                aux = aux_coefficient * part.metrics.get("aux_loss", [0.0] * rounds)[number]
                made.losses.append((part.losses[number] - aux) * share + aux * (ranks if by_all else 1))
            columns = ([getattr(part, name)[number] for part in parts] for name in ("tokens", "chosen", "pairs"))
            counted = Counted(*map(tuple, columns))
            made.tokens += counted.valid
            for name in parts[0].metrics:
                weights = weigh.shares(name, counted, kept if number == rounds - 1 else ranks)
                values = [part.metrics[name][number] for part in parts]
                if sign := EXTREMES.get(name):
                    made.metrics.setdefault(name, []).append(sign * max(sign * value for value in values))
                    continue
                # What does not count may be NaN.
                mean = sum(value * weight for value, weight in zip(values, weights, strict=True) if weight)
                made.metrics.setdefault(name, []).append(mean)
        return made

    def loss(self, *, finite_only: bool, batch_size: int, counted: int | None = None) -> float:
        """Sample-weighted mean, as transformers 5.23 ``Trainer.evaluation_loop``.

        Args:
            finite_only: Leave NaN and infinite batches out, unless all are.
            batch_size: ``per_device_eval_batch_size``: each loss is repeated so often, whatever its batch's own size.
            counted: How many of these count, from the first; None is all.
        """
        repeated = np.repeat(np.asarray(self.losses, np.float64), batch_size)[:counted]
        return _mean(repeated, np.ones_like(repeated), finite_only)

    def token_loss(self, *, finite_only: bool) -> float:
        """Mean over all scored tokens."""
        return _mean(np.asarray(self.losses, np.float64), np.asarray(self.tokens, np.float64), finite_only)


def _mean(values: np.ndarray, weights: np.ndarray, finite_only: bool) -> float:
    finite = np.isfinite(values)
    if finite_only and finite.any():
        values, weights = values[finite], weights[finite]
    return float((values * weights).sum() / max(weights.sum(), 1))


class Evaluator:
    """Evaluates batches with given parameters.

    Args:
        objective: The training objective; dropout and NEFTune are off while the model is in ``eval()``.
        compiled: False runs eagerly.
    """

    def __init__(self, objective: Objective, *, compiled: bool = True) -> None:
        self.objective = objective
        self._measure = mx.compile(self._sums, inputs=objective.captured) if compiled else self._sums

    def run(
        self,
        params: dict[str, mx.array],
        batches: Iterable[Batch],
        make_inputs: Callable[[Batch], Inputs],
        *,
        on_batch: Callable[[], None],
        logits_to: LogitsSink | None = None,
    ) -> EvalSums:
        """Evaluate all ``batches``; ``on_batch`` is called after each."""
        model = self.objective.model
        training = model.training
        model.eval()
        sums = EvalSums()
        try:
            for batch in batches:
                inputs = make_inputs(batch)
                logits = loss = None
                sums.count(batch.examples)
                with naming_shortage(partial(describe_evaluation, *inputs.arrays["input_ids"].shape)):
                    if batch.has_labels:
                        loss = self._add(params, inputs, sums)
                    if logits_to is not None:
                        self.objective.slots.bind(params)
                        kept = self.objective.logits(inputs.arrays)[:, : batch.input_ids.shape[1]]
                        logits = np.array(kept.astype(mx.float32))
                if logits_to is not None and logits is not None:
                    predicted, labels = self.objective.predictions(logits, batch)
                    logits_to(predicted, labels if batch.has_labels else None, batch, loss)
                on_batch()
        finally:
            model.train(training)
        return sums

    def _add(self, params: dict[str, mx.array], inputs: Inputs, sums: EvalSums) -> float:
        try:
            measured = self._measure(params, inputs.arrays)
        finally:
            self.objective.slots.bind(params)
        values: list[float] = mx.stack(list(measured)).tolist()  # pyright: ignore[reportAssignmentType]
        divisor = self.objective.divisor(inputs)
        metrics = dict(zip(self.objective.metrics, values[1:], strict=True))
        metrics |= {name: metrics[name] / divisor for name in TOKEN_METRICS if name in metrics}
        mean = math.nan if is_undefined(self.objective.plan, inputs.valid) else values[0] / divisor
        sums.losses.append(mean + self.objective.aux_coefficient * metrics.get("aux_loss", 0.0))
        sums.tokens.append(inputs.valid)
        sums.chosen.append(inputs.chosen)
        sums.pairs.append(inputs.pairs)
        for name, value in metrics.items():
            sums.metrics.setdefault(name, []).append(value)
        return sums.losses[-1]

    def _sums(self, params: dict[str, mx.array], arrays: dict[str, mx.array]) -> tuple[mx.array, ...]:
        loss, measured = self.objective(params, arrays)
        return loss, *(measured[name] for name in self.objective.metrics)
