"""One optimizer step as pure, compiled functions.

A window of micro-batches accumulates token-weighted gradients; the last one also clips and updates. A micro-batch may
be computed in pieces of rows, which share its denominators. Nothing in a window waits for the device: every value that
a log needs comes back as a lazy scalar.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any
from weakref import WeakSet

import mlx.core as mx

from ..settings.clipping import GradClip
from .backward_order import gradient_stages
from .clip import clip_gradients
from .exchange import GradientExchange
from .inputs import Inputs
from .measured import StepMetrics
from .objective import Objective
from .optim import Optimizer
from .optimizers.contract import Arrays
from .trained import Trained
from .weighting import ByTokens, Weighting, Weights

# Shares of the blocks that are still to go back when a stage of gradients ends. The last is large, for what waits on a
# device then needs memory, and under checkpointing gradients take more and more of that.
STAGES = 3 / 4, 1 / 2, 3 / 8, 1 / 4

# Divides the arrays of a micro-batch into pieces of rows, first to last.
Cut = Callable[[Inputs], Sequence[Arrays]]


def keep_whole(micro: Inputs) -> Sequence[Arrays]:
    """The :data:`Cut` that makes no pieces."""
    return (micro.arrays,)


class Step(Trained):
    """The training step of one run; owns the trainable arrays and the optimizer's state.

    Args:
        objective: Loss of a micro-batch as a function of the parameters.
        optimizer: The update rule.
        clip: The clip in force.
        seed: Root of the keys that dropout and NEFTune draw from.
        weigh: What each micro-batch of a window weighs; None is :func:`~hf_mlx.training.weighting.ByTokens`.
        computed_in: Says which trained arrays the model only reads cast, and to which dtype: those are cast together.
        exchange: Adds the gradients of a window up over several processes; None for one process.
        compiled: False runs the same functions eagerly, for debugging.

    Attributes:
        updates: Steps that the optimizer's state has seen; its count, which lives on as the state does.
        draws: Micro-batches trained so far; with ``seed`` it is the whole random state of training.
        traces: How many distinct shapes were traced so far.
        cut: How a micro-batch is divided; no number depends on it but by rounding.
    """

    #: Whether a micro-batch may be computed in pieces of rows.
    divisible = True

    def __init__(
        self,
        objective: Objective,
        optimizer: Optimizer,
        clip: GradClip,
        *,
        seed: int = 42,
        weigh: Weighting | None = None,
        computed_in: Callable[[], Mapping[str, mx.Dtype]] = dict,
        exchange: GradientExchange | None = None,
        compiled: bool = True,
    ) -> None:
        self.objective = objective
        self.optimizer = optimizer
        self.clip = clip
        self.weigh = weigh or ByTokens()
        self.exchange = exchange
        self.seed = seed % 2**32
        self.draws = 0
        self.updates = 0
        self.traces = 0
        self.cut: Cut = keep_whole
        self._computed_in = computed_in
        self._carry: tuple[Arrays, Arrays] | None = None
        self._holds = WeakSet()
        self._compiled = compiled
        params = objective.slots.read()
        self._names = list(params)
        self._bundles = self._arrange(params)
        self._compile()
        self.load(params, optimizer.init(params))
        # Weights are constants of the trace, so they must be data by then, not a pending read from disk.
        mx.eval(objective.model.parameters(), self._params, self._state)

    def __call__(self, window: Sequence[Inputs], step: int, lr: float) -> StepMetrics:
        """Run one window and update the parameters.

        Args:
            window: The micro-batches of this optimizer step, at least one.
            step: Counts from 1; enters the bias corrections.
            lr: Learning rate of this step.
        """
        try:
            sums = self._train(self._pieces(window, len(window)), self._hyper(step, lr))
        finally:
            self._bind_what_moved()
        self._carry = None
        return StepMetrics.split(sums)

    def accumulate(self, window: Sequence[Inputs], count: int) -> None:
        """Add the gradients of the first ``count`` micro-batches to the carry, without an update."""
        try:
            self._accumulate_all(self._pieces(window, count))
        finally:
            self._bind_what_moved()

    def retrace(self) -> None:
        """Forget what was traced, once frozen weights of the model are others."""
        self._compile()

    def _compile(self) -> None:
        self._accumulate = self._wrap(self._accumulate_micro)
        self._update = self._wrap(self._update_micro)
        self._apply = self._wrap(self._update_carried)
        self._compile_update()

    def _wrap(self, function: Callable) -> Callable:
        # What moves beside the parameters is read when a compiled function is called.
        return mx.compile(function, inputs=self.objective.captured) if self._compiled else function

    def _train(self, pieces: Sequence[tuple[Arrays, Weights]], hyper: Arrays) -> Arrays:
        """Accumulate ``pieces``, the last of a window, and update; what it measured."""
        if self.optimizer.on_host or not self._updates_with_last(pieces):
            self._accumulate_all(pieces)
            return self._finish(hyper)
        if self._replaces:
            return self._train_large(pieces, hyper)
        self._accumulate_all(pieces[:-1])
        self._params, self._state, sums = self._update(self._params, self._state, self._carry, *pieces[-1], hyper)
        # As for one that is accumulated: the forward pass first.
        self._begin_left({name: value for name, value in sums.items() if name != "grad_norm"})
        mx.async_eval(self._params, self._state, sums)
        return sums

    def _train_large(self, pieces: Sequence[tuple[Arrays, Weights]], hyper: Arrays) -> Arrays:
        """:meth:`_train` where an update lets the old arrays go.

        Gradients are begun in stages, so that the device has one to do while the host describes what follows from them,
        while callbacks run, while the next step is described and while that is ordered.
        """
        if self.exchange is not None or self.cut is not keep_whole:
            self._accumulate_all(pieces)
            return self._finish(hyper)
        first, second, *others = self._stages
        self._accumulate_all(pieces[:-1])
        traces = self.traces
        carried = self._accumulate_piece(*pieces[-1])
        mx.async_eval([carried[name] for name in first])
        grads, factor, sums, squares = self._measure(self._carry)
        moved = self._updated(self._params, grads, self._state, hyper, factor.get("scale"))
        # Squares are little work, so they go between gradients. MLX begins with what it is asked for last.
        half = len(second) // 2
        second = [*second[:half], *first, *second[half:]]
        self._take(*moved, left=[[(carried[name], squares[name]) for name in stage] for stage in others])
        mx.async_eval([(carried[name], squares[name]) for name in second])
        if self.traces > traces:
            # Where memory does not suffice for a shape, that shows while the old arrays are there.
            mx.async_eval(grads, sums)
        self._let_go()
        return sums

    @cached_property
    def _stages(self) -> list[list[str]]:
        """Large arrays by when their gradients come; first asked for while the model holds no placeholders."""
        alone = {name: self._params[name] for name in self._bundles.alone}
        return gradient_stages(self.objective.model, alone, STAGES)

    def _updates_with_last(self, pieces: Sequence[tuple[Arrays, Weights]]) -> bool:
        """Whether the last piece and the update are one compiled function.

        Not where processes add their gradients up: a CUDA graph with nccl in it is instantiated anew for each step, so
        it should hold little else.
        """
        return self.exchange is None or self.exchange.in_model

    def _finish(self, hyper: Arrays) -> Arrays:
        """Update with the gradients that are carried; what the window measured."""
        if self.optimizer.on_host:
            grads, sums = self._clip(self._carry)
            return self._update_clipped(grads, sums, hyper)
        if self._replaces:
            grads, factor, sums, _ = self._measure(self._carry)
            # Described while the device is still busy with the gradients.
            moved = self._updated(self._params, grads, self._state, hyper, factor.get("scale"))
            # What may fail for want of memory has been computed by the time that the old arrays go.
            (mx.async_eval if self.cut is keep_whole else mx.eval)(grads, factor, sums)
            del grads
            self._replace(*moved)
            return sums
        self._params, self._state, sums = self._apply(self._params, self._state, self._carry, hyper)
        mx.async_eval(self._params, self._state, sums)
        return sums

    def _replace(self, params: Arrays, state: Any) -> None:
        super()._replace(params, state)
        if self.cut is not keep_whole:
            # Where memory is short, it runs out within the step that asks for it.
            self.begin_update()

    def _accumulate_all(self, pieces: Sequence[tuple[Arrays, Weights]]) -> None:
        for arrays, weights in pieces:
            mx.async_eval(self._accumulate_piece(arrays, weights))

    def _accumulate_piece(self, arrays: Arrays, weights: Weights) -> Arrays:
        """Describe the gradients with those of a piece, and begin its forward pass; the gradients.

        The device is started without waiting for it: on the forward pass first, whose smaller graph is ordered sooner,
        while the device has nothing else to do.
        """
        self._begin_stage()
        self._carry = grads, sums = self._accumulate(self._params, self._carry, arrays, weights)
        self._begin_left(sums)
        return grads

    def _pieces(self, window: Sequence[Inputs], count: int) -> list[tuple[Arrays, Weights]]:
        """Arrays and weights of each piece of the first ``count`` micro-batches; all pieces weigh as the whole."""
        made = []
        for micro, weights in zip(window[:count], self.weigh(window), strict=False):
            first_row = 0
            for piece in self.cut(micro):
                counted = {**weights, "micro_batch": mx.array(1.0 if first_row == 0 else 0.0)}
                key = mx.array([self.seed, self._draw(), first_row], mx.uint32)
                made.append(({**piece, "key": key}, counted))
                first_row += piece["input_ids"].shape[0]
            self.draws += 1
        return made

    def _draw(self) -> int:
        """A number that no other micro-batch of the run has, on any process."""
        return self.draws if self.exchange is None else self.draws * self.exchange.size + self.exchange.rank

    def _accumulate_micro(self, params: Arrays, carry: Any, arrays: Arrays, weights: Weights) -> tuple[Arrays, Arrays]:
        self.traces += 1  # runs only while tracing

        def weighted(params: Arrays) -> tuple[mx.array, Any]:
            loss, measured = self.objective(params, arrays)
            loss = loss / weights["loss"]
            if self.objective.aux_coefficient:
                loss = loss + self.objective.aux_coefficient * measured["aux_loss"] / weights["aux_loss"]
            return loss, measured

        (loss, measured), grads = mx.value_and_grad(weighted)(self._bundles.unpack(params, cast=True))
        grads = {name: grad.astype(params[name].dtype) for name, grad in self._bundles.pack(grads).items()}
        if self.exchange is not None:
            measured = measured | self.exchange.extremes(measured)
        weighed = {name: measured[name] / by for name, by in weights["metrics"].items() if name in measured}
        metrics = {"loss": loss, "micro_batches": weights["micro_batch"], **measured, **weighed}
        if carry is None:
            return grads, metrics
        return add(carry[0], grads), add(carry[1], metrics)

    def _update_micro(
        self, params: Arrays, state: Any, carry: Any, arrays: Arrays, weights: Weights, hyper: Arrays
    ) -> tuple[Arrays, Any, Arrays]:
        carry = self._accumulate_micro(params, carry, arrays, weights)
        return self._update_carried(params, state, carry, hyper)

    def _update_carried(self, params: Arrays, state: Any, carry: Any, hyper: Arrays) -> tuple[Arrays, Any, Arrays]:
        grads, metrics, norm, _ = self._gather(carry)
        grads, scale = clip_gradients(grads, self.clip, norm)
        params, state = self.optimizer.update(params, grads, state, hyper, scale)
        return params, state, {**metrics, "grad_norm": norm}


def read_scalar(value: Any) -> float:
    """A lazy scalar as a number; waits for the device."""
    return float(value.item())


def add(a: Arrays, b: Arrays) -> Arrays:
    """The sums of two dicts of the same keys."""
    return {key: a[key] + b[key] for key in a}
