"""A loss that a script computes in torch: MLX makes the logits, torch the loss and its gradient by them, MLX the rest.

Two compiled functions meet at the logits: a forward pass, and a backward pass that computes the forward again with the
gradient by the logits as an input. Nothing is approximated; the price is a second forward pass and all the logits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from ..data.batch import Batch
from .evaluation import EvalSums, Evaluator, LogitsSink
from .inputs import Counted, Inputs
from .objective import TokenObjective
from .optimizers.contract import Arrays
from .shortage import describe_evaluation, naming_shortage
from .step import Step, add
from .weighting import Weights

# The number of a forward pass over the same rows -> logits (B, T, V), T as the collator made it.
Forward = Callable[[int], mx.array]
# Keeps the draws of a second pass over the same rows apart from those of the first.
_PASS = 0x9E3779B9


@dataclass(frozen=True)
class HostMicro:
    """A micro-batch as the script's loss sees it.

    Attributes:
        batch: What the collator made.
        items: Tokens of the window that are scored.
        window: Micro-batches of the window.
        draws: Whether another forward pass has other logits (dropout, NEFTune).
        remainder: Rows that accelerate's ``gather_for_metrics`` leaves of what several processes gather; 0 for all.
    """

    batch: Batch
    items: int
    window: int
    draws: bool
    remainder: int = 0


class HostLoss(Protocol):
    """The script's loss."""

    def train(self, forward: Forward, micro: HostMicro) -> tuple[float, list[mx.array | None]]:
        """The loss of a micro-batch as it counts in the window, and its gradient by the logits of each pass.

        A gradient is (B, T, V) like the logits, or None where the loss does not depend on the pass.
        """
        ...

    def evaluate(self, forward: Forward, micro: HostMicro, *, wants_logits: bool) -> tuple[float, np.ndarray | None]:
        """The loss of an evaluation batch, and its logits (B, T, V) where they are wanted."""
        ...


class AsItIs:
    """The :class:`~hf_mlx.training.weighting.Weighting` of losses that weigh what they weigh."""

    def __call__(self, window: Sequence[Inputs]) -> list[Weights]:
        return [{} for _ in window]

    def shares(self, name: str, counted: Counted, kept: int) -> list[float]:
        """Each process the same; the script gathers what it measures itself."""
        return [1 / len(counted.valid)] * len(counted.valid)


class HostLossStep(Step):
    """:class:`~hf_mlx.training.step.Step` whose loss is the script's.

    Args:
        loss: The script's loss.
        count: Tokens of a window that are scored.
        options: Those of the base class.
    """

    divisible = False
    objective: TokenObjective

    def __init__(self, *args: Any, loss: HostLoss, count: Callable[[Sequence[Inputs]], int], **options: Any) -> None:
        super().__init__(*args, weigh=AsItIs(), **options)
        self._loss, self._count = loss, count

    def _compile(self) -> None:
        super()._compile()
        self._forward = self._wrap(self._logits)
        self._backward = self._wrap(self._gradients)

    def _updates_with_last(self, pieces: Sequence[tuple[Arrays, Weights]]) -> bool:
        return False

    def _pieces(self, window: Sequence[Inputs], count: int) -> list[tuple[Arrays, Weights]]:
        items, made = self._count(window), []
        for micro in window[:count]:
            key = mx.array([self.seed, self._draw(), 0], mx.uint32)
            batch = _batch(micro)
            arrays = {**host_arrays(micro.arrays, batch), "key": key}
            rest = 0 if micro.peers is None else micro.peers.remainder
            made.append((arrays, {"micro": HostMicro(batch, items, len(window), self.objective.draws, rest)}))
            self.draws += 1
        return made

    def _accumulate_all(self, pieces: Sequence[tuple[Arrays, Weights]]) -> None:
        for arrays, weights in pieces:
            self._carry = self._accumulate_host(arrays, weights["micro"])
            mx.async_eval(self._carry)

    def _accumulate_host(self, arrays: Arrays, micro: HostMicro) -> tuple[Arrays, Arrays]:
        width = micro.batch.shape[1]
        self._begin_left()

        def forward(number: int) -> mx.array:
            try:
                return self._forward(self._params, _numbered(arrays, number))[:, :width]
            finally:
                # Tracing leaves placeholders in the model, which the loss may look at.
                self.objective.slots.bind(self.params)

        loss, cotangents = self._loss.train(forward, micro)
        # Of several processes the mean counts, and they add up.
        share = 1 if self.exchange is None else 1 / self.exchange.size
        sums = {"loss": mx.array(loss * share, mx.float32), "micro_batches": mx.array(1.0)}
        grads, carried = self._carry if self._carry is not None else (None, None)
        for number, cotangent in enumerate(cotangents):
            if cotangent is not None:
                cotangent = cotangent if share == 1 else cotangent * share
                padded = mx.pad(cotangent, [(0, 0), (0, arrays["input_ids"].shape[1] - width), (0, 0)])
                grads = self._backward(self._params, grads, _numbered(arrays, number), padded)
        if grads is None:
            grads = {name: mx.zeros_like(value) for name, value in self._params.items()}
        return grads, sums if carried is None else add(carried, sums)

    def _logits(self, params: Arrays, arrays: Arrays) -> mx.array:
        self.traces += 1  # runs only while tracing
        return self.objective.forward(self._bundles.unpack(params, cast=True), arrays)

    def _gradients(self, params: Arrays, carried: Any, arrays: Arrays, cotangent: mx.array) -> Arrays:
        def product(params: Arrays) -> mx.array:
            logits = self.objective.forward(params, arrays)
            return (logits * cotangent.astype(logits.dtype)).astype(mx.float32).sum()

        grads = self._bundles.pack(mx.grad(product)(self._bundles.unpack(params, cast=True)))
        grads = {name: grad.astype(params[name].dtype) for name, grad in grads.items()}
        return grads if carried is None else add(carried, grads)


class HostEvaluator(Evaluator):
    """:class:`~hf_mlx.training.evaluation.Evaluator` whose loss is the script's.

    Args:
        objective: Gives the logits.
        loss: The script's loss.
        count: Tokens of a batch that are scored.
    """

    objective: TokenObjective

    def __init__(self, objective: TokenObjective, loss: HostLoss, *, count: Callable[[Sequence[Inputs]], int]) -> None:
        super().__init__(objective)
        self._loss, self._count = loss, count
        self._forward = mx.compile(objective.forward)

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
        model, sums = self.objective.model, EvalSums()
        training = model.training
        model.eval()
        try:
            for batch in batches:
                inputs = make_inputs(batch)
                arrays = host_arrays(inputs.arrays, batch)
                sums.count(len(batch.input_ids))
                with naming_shortage(lambda shape=arrays["input_ids"].shape: describe_evaluation(*shape)):
                    loss, logits = self._measure_host(params, arrays, batch, inputs, wants_logits=logits_to is not None)
                if loss is not None:
                    sums.losses.append(loss)
                    sums.tokens.append(inputs.valid)
                    sums.chosen.append(0)
                    sums.pairs.append(0)
                if logits_to is not None and logits is not None:
                    logits_to(logits, batch.labels if batch.has_labels else None, batch, loss)
                on_batch()
        finally:
            model.train(training)
        return sums

    def _measure_host(
        self, params: Arrays, arrays: Arrays, batch: Batch, inputs: Inputs, *, wants_logits: bool
    ) -> tuple[float | None, np.ndarray | None]:
        def forward(_: int) -> mx.array:
            try:
                return self._forward(params, arrays)[:, : batch.shape[1]]
            finally:
                self.objective.slots.bind(params)

        if not batch.has_labels:  # transformers asks the model alone
            return None, np.array(forward(0).astype(mx.float32)) if wants_logits else None
        return self._loss.evaluate(
            forward, HostMicro(batch, self._count([inputs]), 1, draws=False), wants_logits=wants_logits
        )


def measuring_nothing(objective: TokenObjective) -> TokenObjective:
    """``objective`` for a step that logs what the script's loss logs."""
    silent = copy.copy(objective)
    silent.metrics, silent.aux_coefficient = (), 0.0
    return silent


def host_arrays(arrays: Arrays, batch: Batch) -> Arrays:
    """What a forward pass reads of a micro-batch whose rows are as the collator made them."""
    names = ("input_ids", "segments", "width", "lengths", "keys", "shown_keys")
    kept = {name: arrays[name] for name in names if name in arrays}
    padded = bool((batch.lengths < batch.shape[1]).any())
    if padded and batch.has_mask and not kept.keys() & {"segments", "keys", "shown_keys"}:
        # A loss over all the logits, padding included, must find transformers' ones there.
        kept["shown_keys"] = mx.arange(arrays["input_ids"].shape[1])[None, :] < arrays["lengths"][:, None]
    return kept


def _numbered(arrays: Arrays, number: int) -> Arrays:
    if number == 0:
        return arrays
    seed, draws, row = (int(part) for part in np.array(arrays["key"]))
    return {**arrays, "key": mx.array([(seed + number * _PASS) % 2**32, draws, row], mx.uint32)}


def _batch(micro: Inputs) -> Batch:
    assert micro.batch is not None, "rows are fed with what the collator made"
    return micro.batch
